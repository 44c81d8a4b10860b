"""Reductions over any dims. Sums accumulate in float32 (integers in int64), as eager's do.

A body gets (b, x, axes, result dtype) and returns a Value whose reduced axes are still there, with
size 1; the translator drops them where the caller did not ask to keep them.
"""

from __future__ import annotations

from typing import Any

from .op import ALL, NUMBERS, Call, T, call, composite, reduction

#: elements of a part of a row whose best place is looked for
LONGEST_PART = 8192

_DIMS = [call(T(4, 33), [1]), call(T(4, 33), [0], True), call(T(3, 5, 17), [0, 2])]


def wide(b: Any, x: Any) -> Any:
    """x in the dtype that statistics are computed in: float32, or float64."""
    return b.cast(x, "float64" if x.dtype == "float64" else "float32")


@reduction(
    "aten.sum.dim_IntList",
    "aten.sum.default",
    dtypes=ALL,
    samples=[*_DIMS, call(T(2, 3, 150), [2]), call(T(5, 7))],
    name="sum",
)
def sum_(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Sum of the elements."""
    return b.reduce("sum", x, axes, dtype)


@reduction("aten.mean.dim", "aten.mean.default", samples=[*_DIMS, call(T(5, 7))])
def mean(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Sum of the elements over how many there are."""
    return b.cast(b.mean(wide(b, b.cast(x, dtype)), axes), dtype)


@reduction(
    "aten.amax.default",
    "aten.max.default",
    dtypes=NUMBERS,
    samples=[*_DIMS[:2], call(T(5, 7))],
)
def amax(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Largest element; NaN if there is one."""
    return b.reduce("amax", x, axes)


@reduction(
    "aten.amin.default",
    "aten.min.default",
    dtypes=NUMBERS,
    samples=[*_DIMS[:2], call(T(5, 7))],
)
def amin(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Smallest element; NaN if there is one."""
    return b.reduce("amin", x, axes)


@reduction(
    "aten.prod.dim_int",
    "aten.prod.default",
    dtypes=NUMBERS,
    samples=[
        call(T(4, 9, low=1, high=3), 1),
        call(T(3, 5, low=1, high=2), 0, True),
        call(T(3, 4, low=1, high=3)),
    ],
)
def prod(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Product of the elements."""
    return b.reduce("prod", x, axes, dtype)


def _truths(low: int, high: int) -> list[Call]:
    """Mixed rows; columns, some dims and everything in [low, high)."""
    return [
        call(T(4, 33, low=0, high=2), 1),
        call(T(4, 9, low=low, high=high), 0, True),
        call(T(3, 4, 5, low=low, high=high), [0, 2]),
        call(T(4, 9, low=low, high=high)),
    ]


@reduction(
    "aten.any.dim",
    "aten.any.dims",
    "aten.any.default",
    dtypes=ALL,
    samples=_truths(low=0, high=1),
    name="any",
)
def any_(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Whether any element is not zero."""
    return b.cast(b.reduce("any", x, axes, "bool"), dtype)


@reduction(
    "aten.all.dim",
    "aten.all.dims",
    "aten.all.default",
    dtypes=ALL,
    samples=_truths(low=1, high=3),
    name="all",
)
def all_(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Whether no element is zero."""
    return b.cast(b.reduce("all", x, axes, "bool"), dtype)


def _one_dim_or_flat(x: Any, dim: int | None = None, *_: Any) -> str | None:
    return "0-d operand" if x.ndim == 0 else None


@reduction(
    "aten.argmax.default",
    dtypes=NUMBERS,
    declines=_one_dim_or_flat,
    samples=[call(T(4, 33), 1), call(T(4, 33), 0, True), call(T(5, 7))],
)
def argmax(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Place of the largest element (of the first NaN, if there is one)."""
    return _best(b, x, axes, "amax", "argmax")[1]


@reduction(
    "aten.argmin.default",
    dtypes=NUMBERS,
    declines=_one_dim_or_flat,
    samples=[call(T(4, 33), 1), call(T(5, 7))],
)
def argmin(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """Place of the smallest element (of the first NaN, if there is one)."""
    return _best(b, x, axes, "amin", "argmin")[1]


def _no_order(x: Any, *_: Any) -> str | None:
    return "truth values" if x.dtype == "bool" else "0-d operand" if x.ndim == 0 else None


_ONE_DIM = [call(T(4, 33), 1), call(T(4, 33), 0, True), call(T(2, 3, 150), -1)]


@composite(
    "aten.max.dim",
    dtypes=NUMBERS,
    declines=_no_order,
    samples=_ONE_DIM,
)
def max_dim(b: Any, x: Any, dim: int, keepdim: bool) -> Any:
    """(largest element, place of the first one); NaN if there is one."""
    return _keep_both(b, _best(b, x, [dim], "amax", "argmax"), dim, keepdim)


@composite("aten.min.dim", dtypes=NUMBERS, declines=_no_order, samples=_ONE_DIM)
def min_dim(b: Any, x: Any, dim: int, keepdim: bool) -> Any:
    """(smallest element, place of the first one); NaN if there is one."""
    return _keep_both(b, _best(b, x, [dim], "amin", "argmin"), dim, keepdim)


def _best(b: Any, x: Any, axes: Any, best: str, place: str) -> tuple[Any, Any]:
    """(best element, place of the first one). Few long rows are cut in parts of one size: the best
    of the parts' best is looked up among their places."""
    parts = b.even_parts(x, axes, LONGEST_PART) if len(axes) == 1 else 1
    if parts == 1:
        return b.reduce(best, x, axes, split=False), b.reduce(place, x, axes, "int64")
    axis = axes[0] % x.ndim
    cut, within, across = b.split(x, [axis], parts)
    tops, places = b.reduce(best, cut, within, split=False), b.reduce(place, cut, within, "int64")
    part = b.reduce(place, tops, across, "int64")
    own = [None if k in across else k for k in range(cut.ndim)]
    inside = b.gather(places, [(across[0], part)], own, part.shape, wrap=False)
    at = b.add(inside, b.mul(part, cut.shape[within[0]]), 1)
    return tuple(b.squeeze(v, across) for v in (b.reduce(best, tops, across, split=False), at))


def _keep_both(b: Any, found: tuple[Any, Any], dim: int, keepdim: bool) -> tuple[Any, Any]:
    return _keep(b, found[0], [dim], keepdim), _keep(b, found[1], [dim], keepdim)


@reduction("aten.logsumexp.default", samples=[call(T(4, 33), [1]), call(T(3, 9), [0], True)])
def logsumexp(b: Any, x: Any, axes: tuple[int, ...], dtype: str) -> Any:
    """log(sum(exp(x))), computed from the largest element down."""
    x = wide(b, x)
    parts = b.row_parts(x, axes)
    if parts == 1:
        return b.cast(b.reduce("logsumexp", x, axes), dtype)
    cut, inner, outer = b.split(x, axes, parts)
    whole = b.reduce("logsumexp", b.reduce("logsumexp", cut, inner), outer)
    return b.cast(b.reshape(whole, [1 if k in axes else s for k, s in enumerate(x.shape)]), dtype)


def moments(b: Any, x: Any, axes: Any, correction: Any) -> tuple[Any, Any]:
    """(variance, mean) of a float32 or float64 Value, axes kept.

    Two passes, as exact as Welford's; few long rows are read once, in parts.
    """
    parts = b.row_parts(x, axes, 3)
    if parts > 1:
        return moments_of_parts(b, x, axes, parts, int(correction))
    center = b.mean(x, axes)
    diff = b.sub(x, center, 1)
    count = 1
    for a in {a % x.ndim for a in axes}:
        count = count * x.shape[a]
    left = b.size_number(count) if not correction else b.size_number(count - int(correction))
    return b.div(b.sum(b.mul(diff, diff), axes), left), center


def moments_of_parts(b: Any, x: Any, axes: Any, parts: int, correction: int = 0) -> tuple[Any, Any]:
    """(variance, mean) of float32 or float64 x, axes kept, from parts of one size.

    Each part is read once; their moments are then combined (Chan et al. 1979). A part's moments are
    taken about its first element, which lies at most sqrt(n) standard deviations from the mean of
    its n: the variance loses little to cancellation, and typically nothing.
    """
    axes = sorted(a % x.ndim for a in axes)
    cut, inner, outer = b.split(x, axes, parts)
    first = cut
    for a in inner:
        first = b.slice(first, a, 0, 1)
    diff = b.sub(cut, first, 1)
    n = b.count(cut, inner)
    shift = b.div(b.sum_of_parts(diff, inner), n)
    spread = b.sub(b.div(b.sum_of_parts(b.mul(diff, diff), inner), n), b.mul(shift, shift), 1)
    center, _ = b.side_by_side(b.add(first, shift, 1), outer)
    spread, outer = b.side_by_side(spread, outer)
    mean = b.div(b.sum_of_parts(center, outer), parts)
    off = b.sub(center, mean, 1)
    total = b.sum_of_parts(b.add(spread, b.mul(off, off), 1), outer)
    var = b.div(total, parts - correction / n)
    kept = [1 if a in axes else s for a, s in enumerate(x.shape)]
    return b.reshape(var, kept), b.reshape(mean, kept)


def _dims(x: Any, dims: Any) -> list[int]:
    return list(range(x.ndim)) if not dims else [dims] if isinstance(dims, int) else list(dims)


def _keep(b: Any, v: Any, axes: list[int], keepdim: bool) -> Any:
    return v if keepdim else b.squeeze(v, axes)


def _odd_correction(
    x: Any, dim: Any = None, correction: Any = 1, keepdim: Any = False
) -> str | None:
    if correction is None:
        correction = 1
    if int(correction) != correction:
        return "a fractional correction"
    count = 1
    for a in _dims(x, dim):
        count = count * x.shape[a]
    if type(count) is int and count <= correction:
        return "no degrees of freedom left"
    return "0-d operand" if x.ndim == 0 else None


@composite(
    "aten.var.correction",
    declines=_odd_correction,
    samples=[call(T(4, 33), [1]), call(T(4, 9), [0], correction=0, keepdim=True)],
)
def var(b: Any, x: Any, dim: Any, correction: Any, keepdim: bool) -> Any:
    """Sum of squared distances from the mean over (n - correction)."""
    correction = 1 if correction is None else correction
    v, _ = moments(b, wide(b, x), _dims(x, dim), correction)
    return _keep(b, b.cast(v, x.dtype), _dims(x, dim), keepdim)


@composite(
    "aten.var_mean.correction",
    declines=_odd_correction,
    samples=[call(T(4, 33), [1]), call(T(4, 9), [0], correction=0, keepdim=True)],
)
def var_mean(b: Any, x: Any, dim: Any, correction: Any, keepdim: bool) -> Any:
    """(variance, mean)."""
    correction = 1 if correction is None else correction
    v, m = moments(b, wide(b, x), _dims(x, dim), correction)
    axes = _dims(x, dim)
    return _keep(b, b.cast(v, x.dtype), axes, keepdim), _keep(b, b.cast(m, x.dtype), axes, keepdim)


@composite(
    "aten.std.correction",
    declines=_odd_correction,
    samples=[call(T(4, 33), [1]), call(T(4, 9), [0], correction=0)],
)
def std(b: Any, x: Any, dim: Any, correction: Any, keepdim: bool) -> Any:
    """Square root of the variance."""
    correction = 1 if correction is None else correction
    v, _ = moments(b, wide(b, x), _dims(x, dim), correction)
    return _keep(b, b.cast(b.sqrt(v), x.dtype), _dims(x, dim), keepdim)
