"""Gathers: reads at computed places, which fuse with what reads them."""

from __future__ import annotations

from typing import Any

from .op import NUMBERS, T, call, composite


def _ids(*shape: int, high: int) -> T:
    return T(*shape, dtype="int64", low=0, high=high)


@composite(
    "aten.embedding.default",
    samples=[call(T(11, 7), _ids(3, 4, high=11)), call(T(5, 1), _ids(6, high=5))],
)
def embedding(b: Any, weight: Any, indices: Any) -> Any:
    """weight[indices]: [V, D], [...] -> [..., D]."""
    shape = (*indices.shape, weight.shape[1])
    places = b.unsqueeze(indices, [len(shape) - 1], len(shape))
    return b.gather(weight, [(0, places)], [None, len(shape) - 1], shape, wrap=False)


def _has_dims(x: Any, *_: Any) -> str | None:
    return "0-d operand" if x.ndim == 0 else None


@composite(
    "aten.index_select.default",
    dtypes=NUMBERS,
    declines=_has_dims,
    samples=[call(T(5, 7), 0, _ids(3, high=5)), call(T(5, 7), 1, _ids(4, high=7))],
)
def index_select(b: Any, x: Any, dim: int, index: Any) -> Any:
    """x taken at index along dim."""
    dim %= x.ndim
    count = index.shape[0] if index.ndim else 1
    shape = tuple(count if a == dim else s for a, s in enumerate(x.shape))
    flat = index if index.ndim else b.reshape(index, (1,))
    places = b.reshape(flat, [count if a == dim else 1 for a in range(x.ndim)])
    along = [None if a == dim else a for a in range(x.ndim)]
    return b.gather(x, [(dim, places)], along, shape, wrap=False)


@composite(
    "aten.gather.default",
    dtypes=NUMBERS,
    declines=_has_dims,
    samples=[call(T(5, 7), 1, _ids(5, 3, high=7)), call(T(5, 7), 0, _ids(2, 7, high=5))],
)
def gather(b: Any, x: Any, dim: int, index: Any) -> Any:
    """out[i, j] = x[i, index[i, j]] along dim."""
    dim %= x.ndim
    along = [None if a == dim else a for a in range(x.ndim)]
    return b.gather(x, [(dim, index)], along, index.shape, wrap=False)


def _one_index(x: Any, indices: Any) -> str | None:
    given = [k for k, i in enumerate(indices) if i is not None]
    if given != list(range(given[0], given[0] + len(given))):
        return "index tensors that are not side by side"
    if any(indices[k].dtype not in ("int64", "int32") for k in given):
        return "a mask as index"
    return None


@composite(
    "aten.index.Tensor",
    dtypes=NUMBERS,
    declines=_one_index,
    samples=[
        call(T(5, 7), [_ids(3, high=5)]),
        call(T(5, 7), [_ids(2, 3, high=5), _ids(3, high=7)]),
    ],
)
def index(b: Any, x: Any, indices: Any) -> Any:
    """x[i, j, ...] with broadcast index tensors; negative ones count from the end."""
    given = [k for k, i in enumerate(indices) if i is not None]
    first, picked = given[0], [indices[k] for k in given]
    rank = max(i.ndim for i in picked)
    middle = [1] * rank
    for i in picked:
        for a, s in enumerate(i.shape):
            if not (type(s) is int and s == 1):
                middle[rank - i.ndim + a] = s
    after = list(range(given[-1] + 1, x.ndim))
    shape = (*x.shape[:first], *middle, *(x.shape[a] for a in after))
    places: list[Any] = [None] * x.ndim
    for a in range(first):
        places[a] = a
    for k, a in enumerate(after):
        places[a] = first + rank + k
    tail = len(after)
    spread = [
        (k, b.reshape(i, (*i.shape, *[1] * tail)) if tail else i)
        for k, i in zip(given, picked, strict=True)
    ]
    return b.gather(x, spread, places, shape, wrap=True)
