"""Layer, RMS, group and batch norm with their backwards. Statistics in float32.

The backward's weight and bias gradients reduce across rows. They are written from the operands anew
(not from values of the dx part), so that they can run in a kernel of their own where that of dx,
which works on whole rows, cannot take them in.
"""

from __future__ import annotations

from typing import Any

from .op import T, call, composite
from .reduction import moments, moments_of_parts, wide


def _axes(x: Any, shape: Any) -> list[int]:
    return list(range(x.ndim - len(shape), x.ndim))


@composite(
    "aten.native_layer_norm.default",
    samples=[
        call(T(4, 33), [33], T(33), T(33), 1e-5),
        call(T(4, 33), [33], None, None, 1e-5),
        call(T(2, 3, 4, 5), [4, 5], T(4, 5), None, 1e-5),
    ],
)
def layer_norm(b: Any, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    """y = (x - mean) * rstd * weight + bias, with rstd = 1 / sqrt(var + eps); (y, mean, rstd)."""
    axes, dtype = _axes(x, shape), x.dtype
    x = wide(b, x)
    var, mean = moments(b, x, axes, 0)
    rstd = b.rsqrt(b.add(var, eps, 1))
    y = b.mul(b.sub(x, mean, 1), rstd)
    if weight is not None:
        y = b.mul(y, wide(b, weight))
    if bias is not None:
        y = b.add(y, wide(b, bias), 1)
    return b.cast(y, dtype), mean, rstd


@composite(
    "aten.native_layer_norm_backward.default",
    samples=[],
)
def layer_norm_backward(
    b: Any, dy: Any, x: Any, shape: Any, mean: Any, rstd: Any, weight: Any, bias: Any, mask: Any
) -> Any:
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight; (dx, dw, db)."""
    axes = _axes(x, shape)
    outer = [a for a in range(x.ndim) if a not in axes]

    def normalized() -> Any:
        return b.mul(b.sub(wide(b, x), wide(b, mean), 1), wide(b, rstd))

    dx = dw = db = None
    if mask[0]:
        xhat, g = normalized(), wide(b, dy)
        if weight is not None:
            g = b.mul(g, wide(b, weight))
        along = b.mul(xhat, b.mean(b.mul(g, xhat), axes))
        dx = b.mul(b.sub(b.sub(g, b.mean(g, axes), 1), along, 1), wide(b, rstd))
    if mask[1] and weight is not None:
        dw = b.squeeze(b.sum(b.mul(wide(b, dy), normalized()), outer), outer)
    if mask[2] and (bias is not None or weight is not None):
        db = b.squeeze(b.sum(wide(b, dy), outer), outer)
    return dx, dw, db


def _rms(b: Any, x: Any, axes: list[int], eps: float) -> Any:
    return b.rsqrt(b.add(b.mean(b.mul(x, x), axes), eps, 1))


_EPSILON = {
    "float16": 0.0009765625,
    "bfloat16": 0.0078125,
    "float32": 1.1920928955078125e-07,
    "float64": 2.220446049250313e-16,
}


@composite(
    "aten._fused_rms_norm.default",
    samples=[call(T(4, 33), [33], T(33), 1e-6), call(T(4, 33), [33], None, 1e-6)],
)
def rms_norm(b: Any, x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    """y = x * rstd * weight, with rstd = 1 / sqrt(mean(x^2) + eps); (y, rstd)."""
    axes, dtype = _axes(x, shape), x.dtype
    x = wide(b, x)
    rstd = _rms(b, x, axes, _EPSILON[x.dtype] if eps is None else eps)
    y = b.mul(x, rstd)
    if weight is not None:
        y = b.mul(y, wide(b, weight))
    return b.cast(y, dtype), rstd


def _rms_dx(b: Any, g: Any, x: Any, rstd: Any, axes: list[int]) -> Any:
    """rstd * (g - xhat * mean(g * xhat))."""
    xhat = b.mul(x, rstd)
    return b.mul(b.sub(g, b.mul(xhat, b.mean(b.mul(g, xhat), axes)), 1), rstd)


@composite("aten._fused_rms_norm_backward.default")
def rms_norm_backward(
    b: Any, dy: Any, x: Any, shape: Any, rstd: Any, weight: Any, mask: Any
) -> Any:
    """dx = rstd * (g - xhat * mean(g * xhat)) with g = dy * weight; dw = sum(dy * xhat)."""
    axes = _axes(x, shape)
    outer = [a for a in range(x.ndim) if a not in axes]
    dx = dw = None
    if mask[0]:
        g = wide(b, dy)
        if weight is not None:
            g = b.mul(g, wide(b, weight))
        dx = _rms_dx(b, g, wide(b, x), wide(b, rstd), axes)
    if mask[1] and weight is not None:
        xhat = b.mul(wide(b, x), wide(b, rstd))
        dw = b.squeeze(b.sum(b.mul(wide(b, dy), xhat), outer), outer)
    return dx, dw


@composite(
    "gems.rms_norm.default",
    samples=[
        call(T(4, 33), T(33), 1e-6, True),
        call(T(4, 33), T(33), 1e-6, False),
        call(T(2, 3, 33), None, 1e-6, True),
    ],
)
def gems_rms_norm(b: Any, x: Any, weight: Any, eps: float, weight_after_cast: bool) -> Any:
    """RMS norm as ``transformers`` rounds it: see ``kernels.fused.register_torch_ops``."""
    dtype = x.dtype
    x = wide(b, x)
    rstd = _rms(b, x, [x.ndim - 1], eps)
    y = b.mul(x, rstd)
    if weight is None:
        return b.cast(y, dtype), rstd
    if weight_after_cast:
        return b.mul(weight, b.cast(y, dtype)), rstd
    return b.cast(b.mul(y, wide(b, weight)), dtype), rstd


_RSTD = T(4, 1, dtype="float32", low=0.5, high=2)
_RSTD_OF_CHANNEL = T(4, dtype="float32", low=0.5, high=2)


@composite(
    "gems.rms_norm_backward.default",
    samples=[
        call(T(4, 33), T(4, 33), _RSTD, T(33), True),
        call(T(4, 33), T(4, 33), _RSTD, T(33), False),
        call(T(4, 33), T(4, 33), _RSTD, None, True),
    ],
)
def gems_rms_norm_backward(
    b: Any, dy: Any, x: Any, rstd: Any, weight: Any, weight_after_cast: bool
) -> Any:
    """The gradients of ``gems::rms_norm``, in float32."""
    axes = [x.ndim - 1]
    outer = list(range(x.ndim - 1))
    g = wide(b, dy)
    if weight is not None:
        g = b.mul(g, wide(b, weight))
    dx = _rms_dx(b, g, wide(b, x), wide(b, rstd), axes)
    if weight is None:
        return dx, None
    xhat = b.mul(wide(b, x), wide(b, rstd))
    if weight_after_cast:
        xhat = wide(b, b.cast(xhat, x.dtype))
    return dx, b.squeeze(b.sum(b.mul(wide(b, dy), xhat), outer), outer) if outer else b.mul(
        wide(b, dy), xhat
    )


def _moments(b: Any, x: Any, axes: list[int]) -> tuple[Any, Any]:
    """(var, mean) of float32 x, axes kept; in parts where a row is too long for one program."""
    parts = b.even_parts(x, axes)
    return moments(b, x, axes, 0) if parts == 1 else moments_of_parts(b, x, axes, parts)


@composite(
    "aten.native_group_norm.default",
    samples=[
        call(T(2, 6, 5), T(6), T(6), 2, 6, 5, 3, 1e-5),
        call(T(2, 4, 3, 3), None, None, 2, 4, 9, 2, 1e-5),
    ],
)
def group_norm(
    b: Any, x: Any, weight: Any, bias: Any, N: Any, C: Any, HxW: Any, group: int, eps: float
) -> Any:
    """Each of ``group`` channel groups of a sample to mean 0, variance 1; (y, mean, rstd)."""
    dtype, shape = x.dtype, x.shape
    n, c = shape[0], shape[1]
    split = b.reshape(wide(b, x), (n, group, c // group, *shape[2:]))
    axes = list(range(2, split.ndim))
    var, mean = _moments(b, split, axes)
    rstd = b.rsqrt(b.add(var, eps, 1))
    y = b.reshape(b.mul(b.sub(split, mean, 1), rstd), shape)
    y = _per_channel(b, y, weight, bias)
    return b.cast(y, dtype), b.squeeze(mean, axes), b.squeeze(rstd, axes)


def _per_channel(b: Any, y: Any, weight: Any, bias: Any) -> Any:
    """y * weight + bias, along axis 1."""
    if weight is not None:
        y = b.mul(y, _channels(b, weight, y.ndim))
    if bias is not None:
        y = b.add(y, _channels(b, bias, y.ndim), 1)
    return y


def _channels(b: Any, v: Any, ndim: int) -> Any:
    """A [C] Value as [1, C, 1, ...] in float32."""
    return b.unsqueeze(wide(b, v), [a for a in range(ndim) if a != 1], ndim)


@composite("aten.native_group_norm_backward.default")
def group_norm_backward(
    b: Any,
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    N: Any,
    C: Any,
    HxW: Any,
    group: int,
    mask: Any,
) -> Any:
    """The gradients of group norm, (dx, dw, db), from the sums over each channel of each sample.

    With g = dy * weight:
    dx = rstd * (g - mean(g) - (x - mean) * rstd^2 * mean(g * (x - mean)))
    """
    shape = x.shape
    n, c = shape[0], shape[1]
    parts = (n, group, c // group, *shape[2:])
    plane = list(range(3, len(parts)))
    keep = [n, group] + [1] * (len(parts) - 2)
    d, stat = b.reshape(wide(b, dy), parts), [b.reshape(wide(b, s), keep) for s in (mean, rstd)]

    def over_plane(v: Any) -> Any:
        return b.sum(v, plane) if plane else v

    def centered() -> Any:
        return b.sub(b.reshape(wide(b, x), parts), stat[0], 1)

    def weighted(v: Any) -> Any:
        if weight is None:
            return v
        return b.mul(v, b.reshape(wide(b, weight), [1, group, c // group] + [1] * len(plane)))

    level, along = over_plane(d), b.mul(over_plane(b.mul(d, centered())), stat[1])
    dx = dw = db = None
    if mask[0]:
        count = b.size_number(b.count(d, [2, *plane]))
        slope = b.mul(stat[1], b.div(b.sum(weighted(along), [2]), count))
        g = b.sub(weighted(d), b.div(b.sum(weighted(level), [2]), count), 1)
        dx = b.reshape(b.mul(b.sub(g, b.mul(centered(), slope), 1), stat[1]), shape)
    if mask[1]:
        dw = b.squeeze(b.sum(b.reshape(along, [n, c]), [0]), [0])
    if mask[2]:
        db = b.squeeze(b.sum(b.reshape(level, [n, c]), [0]), [0])
    return dx, dw, db


def _normalize(b: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Any:
    y = b.mul(b.sub(wide(b, x), mean, 1), rstd)
    return b.cast(_per_channel(b, y, weight, bias), x.dtype)


@composite(
    "aten._native_batch_norm_legit_no_training.default",
    samples=[call(T(3, 4, 5), T(4), T(4), T(4), T(4, low=0.5, high=2), 0.1, 1e-5)],
)
def batch_norm_inference(
    b: Any,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    momentum: float,
    eps: float,
) -> Any:
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias; the statistics stay empty."""
    mean = _channels(b, running_mean, x.ndim)
    rstd = b.rsqrt(b.add(_channels(b, running_var, x.ndim), eps, 1))
    return _normalize(b, x, mean, rstd, weight, bias), None, None


@composite(
    "gems.batch_norm_apply.default",
    samples=[
        call(T(3, 4, 5), T(4, dtype="float32"), _RSTD_OF_CHANNEL, T(4), T(4)),
        call(T(3, 4), T(4, dtype="float32"), _RSTD_OF_CHANNEL, None, None),
    ],
)
def batch_norm_apply(b: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Any:
    """(x - mean) * rstd * weight + bias along axis 1: batch norm, its statistics given."""
    mean, rstd = _channels(b, mean, x.ndim), _channels(b, rstd, x.ndim)
    return _normalize(b, x, mean, rstd, weight, bias)


def batch_moments(b: Any, x: Any) -> tuple[Any, Any, Any]:
    """(var, mean, how many) of each channel of float32 x, axes kept."""
    axes = [a for a in range(x.ndim) if a != 1]
    return (*_moments(b, x, axes), b.count(x, axes))


@composite(
    "aten._native_batch_norm_legit_functional.default",
    samples=[
        call(T(3, 4, 5), T(4), T(4), T(4), T(4, low=0.5, high=2), True, 0.1, 1e-5),
    ],
)
def batch_norm_training(
    b: Any,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """(y, mean, rstd, new running mean, new running variance)."""
    others = [a for a in range(x.ndim) if a != 1]
    if not training:
        y, _, _ = batch_norm_inference(b, x, weight, bias, running_mean, running_var, momentum, eps)
        return y, None, None, b.copy(running_mean), b.copy(running_var)
    var, mean, count = batch_moments(b, wide(b, x))
    rstd = b.rsqrt(b.add(var, eps, 1))
    y = _normalize(b, x, mean, rstd, weight, bias)
    flat_mean, flat_var = b.squeeze(mean, others), b.squeeze(var, others)
    unbiased = _unbiased(b, flat_var, count)
    new_mean = _running(b, running_mean, flat_mean, momentum)
    new_var = _running(b, running_var, unbiased, momentum)
    return y, flat_mean, b.squeeze(rstd, others), new_mean, new_var


def _unbiased(b: Any, var: Any, count: Any) -> Any:
    """var * count / (count - 1); of one element var, which is 0."""
    if type(count) is int:
        return b.mul(var, count / (count - 1)) if count > 1 else var
    return b.div(b.mul(var, b.size_number(count)), b.size_number(count - 1))


def _running(b: Any, old: Any, new: Any, momentum: float) -> Any:
    return b.add(b.mul(new, momentum), b.mul(wide(b, old), 1.0 - momentum), 1)


@composite("aten.native_batch_norm_backward.default", absent=True)
def batch_norm_backward(
    b: Any,
    dy: Any,
    x: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_rstd: Any,
    train: bool,
    eps: float,
    mask: Any,
) -> Any:
    """The gradients of batch norm, (dx, dw, db), with one read of x and dy for each of two steps.

    dx = rstd * weight * (dy - mean(dy) - (x - mean) * rstd^2 * mean(dy * (x - mean)))
    """
    others = [a for a in range(x.ndim) if a != 1]
    count = b.size_number(b.count(x, others))
    if train:
        mean, rstd = _channels(b, save_mean, x.ndim), _channels(b, save_rstd, x.ndim)
    else:
        mean = _channels(b, running_mean, x.ndim)
        rstd = b.rsqrt(b.add(_channels(b, running_var, x.ndim), eps, 1))

    def centered() -> Any:
        return b.sub(wide(b, x), mean, 1)

    db = b.sum(wide(b, dy), others)
    along = b.sum(b.mul(wide(b, dy), centered()), others)  # dw / rstd
    dx = None
    if mask[0]:
        g = wide(b, dy)
        if train:  # what is one number a channel is computed once a channel
            slope = b.mul(b.mul(rstd, rstd), b.div(along, count))
            g = b.sub(b.sub(g, b.div(db, count), 1), b.mul(centered(), slope), 1)
        scale = rstd if weight is None else b.mul(rstd, _channels(b, weight, x.ndim))
        dx = b.mul(g, scale)
    dw = b.mul(along, rstd)
    return (
        dx,
        b.squeeze(dw, others) if mask[1] else None,
        b.squeeze(db, others) if mask[2] else None,
    )
