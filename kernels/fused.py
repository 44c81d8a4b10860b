"""Ops of our own, ``gems::``, which rewrites put in place of a chain of torch's.

Compile workers import this file without torch: torch is imported by ``register_torch_ops`` alone.
The implementations registered here are plain ATen, for a graph or a group that runs as ATen.
"""

from __future__ import annotations

from typing import Any

from .served import served
from .transforms import register_batching, register_gradient

_LIBRARY: Any = None


def register_torch_ops() -> None:
    """Register the ops of ``gems::`` with torch, once.

    rms_norm
    Formula: h = float32(x); n = h * rsqrt(mean(h^2, -1) + eps)
             y = weight * dtype(n) if weight_after_cast (Llama), else dtype(n * weight) (Gemma)
    Shapes:  x [..., N], weight [N] or None -> y [..., N], rstd [..., 1]
    Dtypes:  float16, bfloat16, float32 (float64 computes in float64); rstd is float32
    Rounds:  exactly where the chain in ``transformers`` rounds; the backward computes in float32.
    """
    global _LIBRARY
    if _LIBRARY is not None:
        return
    import torch

    library = torch.library.Library("gems", "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "rms_norm(Tensor x, Tensor? weight, float eps, bool weight_after_cast)"
        " -> (Tensor y, Tensor rstd)",
        tags=tags,
    )
    library.define(
        "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? weight,"
        " bool weight_after_cast) -> (Tensor dx, Tensor dw)",
        tags=tags,
    )
    for name, plain in (("rms_norm", _rms_norm), ("rms_norm_backward", _rms_norm_backward)):
        library.impl(name, served(name, plain), "CompositeExplicitAutograd")
        register_batching(library, name, plain)
    torch.library.register_fake("gems::rms_norm", _rms_norm_fake, lib=library)
    torch.library.register_fake("gems::rms_norm_backward", _rms_norm_backward_fake, lib=library)
    register_gradient(library, "rms_norm", _rms_norm, _rms_norm_autograd, _rms_norm_context)
    library.define("log_softmax_stats(Tensor x, int dim) -> (Tensor top, Tensor logsum)", tags=tags)
    library.impl("log_softmax_stats", _log_softmax_stats, "CompositeExplicitAutograd")
    register_gradient(library, "log_softmax_stats", _log_softmax_stats)
    register_batching(library, "log_softmax_stats", _log_softmax_stats)
    torch.library.register_fake("gems::log_softmax_stats", _log_softmax_stats_fake, lib=library)
    library.define(
        "batch_norm_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias)"
        " -> Tensor",
        tags=tags,
    )
    library.impl("batch_norm_apply", _batch_norm_apply, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "gems::batch_norm_apply", lambda x, *_: torch.empty_like(x), lib=library
    )
    from . import (
        attention_ops,
        bags,
        depthwise,
        draws,
        dropout,
        images,
        packed,
        pool,
        product,
        rows,
        sorting,
    )

    attention_ops.define(library)
    bags.define(library)
    depthwise.define(library)
    images.define(library)
    packed.define(library)
    pool.define(library)
    product.define(library)
    rows.define(library)
    sorting.define(library)
    dropout.define(library)
    draws.define(library)
    _LIBRARY = library


def _wide(x: Any) -> Any:
    """x in the dtype that the norm computes in."""
    import torch

    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _result_dtype(x: Any, weight: Any, weight_after_cast: bool) -> Any:
    import torch

    if weight is None or not weight_after_cast:
        return x.dtype
    return torch.promote_types(weight.dtype, x.dtype)


def _rms_norm(x: Any, weight: Any, eps: float, weight_after_cast: bool) -> tuple[Any, Any]:
    h = _wide(x)
    rstd = (h.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    n = h * rstd
    if weight is None:
        y = n.to(x.dtype)
    elif weight_after_cast:
        y = weight * n.to(x.dtype)
    else:
        y = (n * weight).to(x.dtype)
    return y, rstd.contiguous()


def _rms_norm_fake(x: Any, weight: Any, eps: float, weight_after_cast: bool) -> tuple[Any, Any]:
    import torch

    y = torch.empty_like(x, dtype=_result_dtype(x, weight, weight_after_cast))
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return y, x.new_empty((*x.shape[:-1], 1), dtype=wide)


def _rms_norm_backward(
    dy: Any, x: Any, rstd: Any, weight: Any, weight_after_cast: bool
) -> tuple[Any, Any]:
    """dn = dy * weight; dx = rstd * (dn - n * mean(dn * n, -1)); dw = sum of dy * n over rows."""
    import torch

    h, g = _wide(x), _wide(dy)
    n = h * rstd
    dn = g if weight is None else g * weight
    dx = (rstd * (dn - n * (dn * n).mean(-1, keepdim=True))).to(x.dtype)
    out = torch.empty_like(x)
    if dx.stride() != out.stride():
        dx = out.copy_(dx)
    if weight is None:
        return dx, x.new_empty((0,))
    scaled = _wide(n.to(x.dtype)) if weight_after_cast else n  # what the weight multiplied
    return dx, (g * scaled).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def _rms_norm_backward_fake(
    dy: Any, x: Any, rstd: Any, weight: Any, weight_after_cast: bool
) -> tuple[Any, Any]:
    import torch

    dw = x.new_empty((0,)) if weight is None else torch.empty_like(weight)
    return torch.empty_like(x), dw


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    x, weight, _, weight_after_cast = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, rstd, weight)
    ctx.weight_after_cast = weight_after_cast


def _rms_norm_autograd(ctx: Any, dy: Any, drstd: Any) -> tuple[Any, ...]:
    import torch

    if dy is None:
        return None, None, None, None
    x, rstd, weight = ctx.saved_tensors
    backward = torch.ops.gems.rms_norm_backward.default
    dx, dw = backward(dy, x, rstd, weight, ctx.weight_after_cast)
    return dx, None if weight is None else dw, None, None


def _log_softmax_stats(x: Any, dim: int) -> tuple[Any, Any]:
    """(max(x), log(sum(exp(x - max(x))))) over ``dim``, which stays, in float32 or float64."""
    h = _wide(x)
    top = h.amax(dim, keepdim=True)
    return top.contiguous(), (h - top).exp().sum(dim, keepdim=True).log().contiguous()


def _log_softmax_stats_fake(x: Any, dim: int) -> tuple[Any, Any]:
    import torch

    shape = list(x.shape)
    shape[dim] = 1
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


def _batch_norm_apply(x: Any, mean: Any, rstd: Any, weight: Any, bias: Any) -> Any:
    """(x - mean) * rstd * weight + bias, each of them [C], in x's dtype and layout."""
    import torch

    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (_wide(x) - mean.reshape(shape)) * rstd.reshape(shape)
    if weight is not None:
        y = y * _wide(weight).reshape(shape)
    if bias is not None:
        y = y + _wide(bias).reshape(shape)
    return torch.empty_like(x).copy_(y)
