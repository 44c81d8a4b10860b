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


def picked(b: Any, x: Any, indices: Any) -> tuple[Any, list[Any], tuple[Any, ...]]:
    """What ``x[i, j, ...]`` picks: ((axis, index) pairs, the result's axis along which each other
    axis of x runs, the result's shape)."""
    given = [k for k, i in enumerate(indices) if i is not None]
    together = given == list(range(given[0], given[0] + len(given)))
    first, tensors = given[0] if together else 0, [indices[k] for k in given]
    rank = max(i.ndim for i in tensors)
    middle = [1] * rank
    for i in tensors:
        for a, s in enumerate(i.shape):
            if not (type(s) is int and s == 1):
                middle[rank - i.ndim + a] = s
    rest = [a for a in range(x.ndim) if a not in given]
    before, after = rest[:first], rest[first:]
    shape = (*(x.shape[a] for a in before), *middle, *(x.shape[a] for a in after))
    places: list[Any] = [None] * x.ndim
    for k, a in enumerate(before):
        places[a] = k
    for k, a in enumerate(after):
        places[a] = first + rank + k
    tail = len(after)
    spread = [
        (k, b.reshape(i, (*i.shape, *[1] * tail)) if tail else i)
        for k, i in zip(given, tensors, strict=True)
    ]
    return spread, places, shape


def masks(x: Any, indices: Any) -> str | None:
    if any(i is not None and i.dtype not in ("int64", "int32") for i in indices):
        return "a mask as index"
    return None


@composite(
    "aten.index.Tensor",
    "aten._unsafe_index.Tensor",
    dtypes=NUMBERS,
    declines=masks,
    samples=[
        call(T(5, 7), [_ids(3, high=5)]),
        call(T(5, 7), [_ids(2, 3, high=5), _ids(3, high=7)]),
        call(T(3, 5, 7), [None, _ids(4, 1, high=5), _ids(3, high=7)]),
        call(T(3, 5, 7), [_ids(4, high=3), None, _ids(4, high=7)]),
    ],
)
def index(b: Any, x: Any, indices: Any) -> Any:
    """x[i, j, ...] with broadcast index tensors; negative ones count from the end.

    The dims of the index tensors stand where the first of those was, or first of all where the
    tensors are not side by side.
    """
    spread, places, shape = picked(b, x, indices)
    return b.gather(x, spread, places, shape, wrap=True)


def _unlike_a_gpu(x: Any, size: Any, *factors: Any) -> str | None:
    for k, (n, wanted) in enumerate(zip(x.shape[2:], size, strict=True)):
        if type(n) is not int or type(wanted) is not int:
            return "symbolic sizes"
        if n == wanted and factors[k] not in (None, 1.0):
            return "a factor that changes no size, which CPUs and GPUs take differently"
    return None


@composite(
    "aten.upsample_nearest2d.default",
    "aten.upsample_nearest1d.default",
    "aten.upsample_nearest3d.default",
    declines=_unlike_a_gpu,
    samples=[
        call(T(2, 3, 5, 7), [10, 14], 2.0, 2.0),
        call(T(2, 3, 5, 7), [9, 4]),
        call(T(2, 3, 5, 7), [7, 9], 1.5, 1.3),
        call(T(2, 3, 5), [8]),
        call(T(1, 2, 3, 4, 5), [6, 4, 7]),
    ],
)
def upsample_nearest(
    b: Any, x: Any, size: Any, first: Any = None, second: Any = None, third: Any = None
) -> Any:
    """out[..., i, j] = x[..., floor(i * n / size), ...], the place computed in float32."""
    factors = (first, second, third)
    shape = (*x.shape[:2], *size)
    picked = []
    for k, (n, wanted) in enumerate(zip(x.shape[2:], size, strict=True)):
        axis = k + 2
        if n == wanted:
            continue
        factor = factors[k]
        step = 1.0 / factor if factor and factor > 0 else n / wanted
        one = [wanted if a == axis else 1 for a in range(x.ndim)]
        place = b.floor(b.mul(b.cast(b.iota(one, axis), "float32"), step))
        picked.append((axis, b.minimum(b.cast(place, "int64"), n - 1)))
    along = [None if any(a == axis for axis, _ in picked) else a for a in range(x.ndim)]
    return b.gather(x, picked, along, shape, wrap=False)
