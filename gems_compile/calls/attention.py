"""Attention in eager mode: rules of the overloads that ``scaled_dot_product_attention`` comes to.

That function itself is a composite, behind which autograd lies; it chooses a backend, and the
backend's forward and backward are ops on the device. Each rule here computes what one of them does,
laid out as ATen's, with ``gems::attention``: a program of the host (see ``sized``), for some of the
results are numbers, and tensors that no kernel fills (see ``completed``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.target import Target
from ..lowering.overload import find_overload
from .sized import Steps
from .whole import wide

#: float16 and bfloat16 only; the last query of a causal call sees the last key, or might
NARROW = ("flash", "cudnn")


#: queries of a program, and so many keys that ATen splits them
QUERIES, MANY_KEYS = 64, 1024


def why_native(
    overload: torch._ops.OpOverload, args: Sequence[Any], kwargs: Any, target: Target
) -> str | None:
    """Why a call of one of ``ATTENTION`` is ATen's, or None; the kernels decline others."""
    given = _arguments(overload, args, kwargs)
    tensors = [given["query"], given["key"], given["value"]]
    if given.get("dropout_p", 0.0) != 0.0:
        return "dropout: its mask is ATen's"
    if given.get("return_debug_mask", False):
        return "the mask of a dropout is wanted"
    if given.get("grad_input_mask", [False])[-1]:
        return "the gradient of the bias is wanted"
    if any(t.ndim != 4 or t.numel() == 0 for t in tensors):
        return "its operands are empty, or not of four dims"
    (batch, heads, length, _), keys = tensors[0].shape, tensors[1].shape[2]
    if (
        length < keys >= MANY_KEYS
        and 2 * batch * heads * -(-length // QUERIES) < target.multiprocessors
    ):
        return "few queries, and many keys, which ATen's splits among programs"
    scale = given.get("scale")
    if scale is not None and not 0 < scale < math.inf:
        return f"a scale of {scale}"
    like = LIKE[overload]
    unequal = tensors[0].shape[2] != tensors[1].shape[2]
    if like in NARROW and given.get("is_causal", False) and unequal:
        return "a causal mask of unequal lengths: its diagonal may end at the last key"
    if like in NARROW and tensors[0].dtype == torch.float32:
        return "float32, which ATen's refuses"
    if like == "efficient" and tensors[0].shape[1] != tensors[1].shape[1]:
        return "unequal heads, which ATen's refuses"
    return None


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that are read: not a dropout's seeds, which may lie elsewhere."""
    return [t for t in tensors if t.ndim > 1]


def _how(q: Tensor, causal: bool, scale: float | None, like: str) -> tuple[Any, ...]:
    """What the ops of ours take behind their tensors. Query i sees keys up to i."""
    precision = torch.backends.cuda.matmul.fp32_precision if q.dtype == torch.float32 else ""
    return causal, 0, q.shape[-1] ** -0.5 if scale is None else scale, precision == "tf32", like


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *how: Any) -> Any:
    return torch.ops.gems.attention.default(q, k, v, bias, *how)


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    delta = (wide(do) * wide(out)).sum(-1, keepdim=True)
    given = do, q, k, v, bias, lse, delta, *how
    dk, dv = torch.ops.gems.attention_keys.default(*given)
    return torch.ops.gems.attention_queries.default(*given), dk, dv


def completed(run: Callable[..., Any], native: Sequence[Any]) -> Callable[..., Any]:
    """The run, with what it does not compute as ATen's first call of this kind returned it:
    numbers, None, empty tensors, and a dropout's seeds, which nobody has filled in either."""
    known = [_kind(t) for t in native]

    def whole(tensors: list[Tensor]) -> list[Any]:
        made = run(tensors)
        return [
            made[k] if kind is COMPUTED and k < len(made) else _again(kind, other)
            for k, (kind, other) in enumerate(known)
        ]

    return whole


COMPUTED, EMPTY, NUMBER = "computed", "empty", "number"


def _kind(t: Any) -> tuple[str, Any]:
    """What became of a result, and what says how it is made again; it holds no memory."""
    if not isinstance(t, Tensor):
        return NUMBER, t
    room = functools.partial(torch.empty, t.shape, dtype=t.dtype, device=t.device)
    return COMPUTED if t.numel() else EMPTY, room


def _again(kind: str, other: Any) -> Any:
    return other if kind is NUMBER else other()


# ATen's overloads --------------------------------------------------------------------------------


@functools.cache
def _names(overload: torch._ops.OpOverload) -> tuple[str, ...]:
    return tuple(a.name for a in overload._schema.arguments)


def _arguments(overload: torch._ops.OpOverload, args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
    """By their names, which are those of all backends but for the bias."""
    given = {**dict(zip(_names(overload), args, strict=False)), **kwargs}
    given.setdefault("attn_bias", given.get("attn_mask"))
    return given


def _rule(overload: torch._ops.OpOverload, like: str) -> Callable[..., Any]:
    """Forward: out and the logarithms; backward: the gradients of query, key and value."""
    bind = functools.partial(_arguments, overload)

    def forward(steps: Steps, *args: Any, **kwargs: Any) -> Any:
        given = bind(args, kwargs)
        q = given["query"]
        how = _how(q, given.get("is_causal", False), given.get("scale"), like)
        return steps(_forward, q, given["key"], given["value"], given["attn_bias"], *how)

    def backward(steps: Steps, *args: Any, **kwargs: Any) -> Any:
        given = bind(args, kwargs)
        q, do = given["query"], given["grad_out" if "grad_out" in given else "grad_out_"]
        if do.stride(-1) != 1:  # of a sum, say
            do = do.contiguous()
        rest = (given[n] for n in ("key", "value", "attn_bias", "out", "logsumexp"))
        how = _how(q, given.get("is_causal", False), given.get("scale"), like)
        return steps(_backward, do, q, *rest, *how)

    return backward if overload._schema.name.endswith("backward") else forward


#: ATen's overload, as it goes on behind "_scaled_dot_product_" -> whose layouts its results have:
#: see ``kernels.attention_ops``
_NAMES = {
    "flash_attention": "flash",
    "efficient_attention": "efficient",
    "cudnn_attention": "cudnn",
    "flash_attention_for_cpu": "cpu",
}
_FOUND = {
    find_overload(f"aten._scaled_dot_product_{name}{suffix}.default"): like
    for name, like in _NAMES.items()
    for suffix in ("", "_backward")
}
#: those that this torch has
LIKE = {overload: like for overload, like in _FOUND.items() if overload is not None}
#: and their rules
ATTENTION = {overload: _rule(overload, like) for overload, like in LIKE.items()}
