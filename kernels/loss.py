"""Negative log likelihood and its backward."""

from __future__ import annotations

from typing import Any

from .op import T, call, composite
from .reduction import wide


def _plain(logp: Any, target: Any, weight: Any = None, *_: Any) -> str | None:
    if weight is not None:
        return "class weights"
    return None if logp.ndim == 2 else f"{logp.ndim} dims; 2 have a kernel"


def _picked(b: Any, logp: Any, target: Any, ignore_index: int) -> tuple[Any, Any]:
    """(-logp[row, target[row]] or 0 where ignored, 1 where counted), both [N] in float32."""
    counted = b.call("ne", target, ignore_index, dtype="bool")
    zero = b.full((1,), 0, target.dtype)
    safe = b.where(counted, target, zero, dtype=target.dtype)
    taken = b.gather(logp, [(1, safe)], [0, None], target.shape, wrap=False)
    loss = b.neg(wide(b, taken))
    none = b.full((1,), 0.0, loss.dtype)
    return b.where(counted, loss, none, dtype=loss.dtype), b.cast(counted, loss.dtype)


_TARGET = T(6, dtype="int64", low=0, high=9)


@composite(
    "aten.nll_loss_forward.default",
    declines=_plain,
    samples=[
        *(call(T(6, 9), _TARGET, None, r, -100) for r in (0, 1, 2)),
        call(T(6, 9), _TARGET, None, 1, 3),
    ],
)
def nll_loss(b: Any, logp: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> Any:
    """(loss, count): -logp[target], as it is (0), averaged over counted rows (1) or summed (2)."""
    dtype = logp.dtype
    loss, counted = _picked(b, logp, target, ignore_index)
    if reduction == 0:
        return b.cast(loss, dtype), b.full((), 0.0, dtype)
    total, count = b.sum(loss, [0]), b.sum(counted, [0])
    result = b.div(total, count) if reduction == 1 else total
    return b.cast(b.squeeze(result, [0]), dtype), b.cast(b.squeeze(count, [0]), dtype)


def _plain_backward(dy: Any, logp: Any, target: Any, weight: Any = None, *_: Any) -> str | None:
    return _plain(logp, target, weight)


@composite(
    "aten.nll_loss_backward.default",
    declines=_plain_backward,
    samples=[
        call(T(), T(6, 9), _TARGET, None, 1, -100, T(low=2, high=6)),
        call(T(), T(6, 9), _TARGET, None, 2, 3, T(low=2, high=6)),
        call(T(6), T(6, 9), _TARGET, None, 0, -100, T(low=2, high=6)),
    ],
)
def nll_loss_backward(
    b: Any,
    dy: Any,
    logp: Any,
    target: Any,
    weight: Any,
    reduction: int,
    ignore_index: int,
    total_weight: Any,
) -> Any:
    """-dy at each row's target (over the counted rows when averaged), 0 elsewhere."""
    column = b.iota(logp.shape, 1)
    goal = b.unsqueeze(target, [1], 2)
    counted = b.call("ne", goal, ignore_index, dtype="bool")
    hit = b.call("logical_and", b.call("eq", column, goal, dtype="bool"), counted, dtype="bool")
    g = b.neg(wide(b, dy))
    if reduction == 0:
        g = b.unsqueeze(g, [1], 2)
    elif reduction == 1:
        g = b.div(g, wide(b, total_weight))
    return b.where(hit, g, b.full((1, 1), 0.0, g.dtype), dtype=g.dtype)
