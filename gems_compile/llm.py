"""The ops of language models, each as one function: ``llm.rms_norm(x, weight)``.

In eager mode a call runs kernels of ours, compiled at the first call of its dtypes, shapes and
strides, and so does its backward. Under ``torch.compile(backend="gems")`` it becomes what it is
written with, which fuses with its neighbours; another backend sees one op. Where there is neither a
GPU nor Triton's interpreter, torch's own ops compute the same. More in docs/llm.md.

An argument that cannot be right raises ``errors.ArgumentError``. Gradients are first gradients:
``create_graph=True`` raises. Under ``torch.func`` all run as torch's ops, and differentiate freely.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import own_ops  # noqa: F401 (who imports it has ops of ours served)
from .errors import ArgumentError
from .lowering import llm_losses, llm_ops
from .lowering.own_ops import under_autocast

__all__ = [
    "add_layer_norm",
    "apply_rotary",
    "cross_entropy",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "linear_cross_entropy",
    "rms_norm",
    "silu_and_mul",
    "topk_softmax",
]

_REDUCTIONS = {"none": llm_losses.NONE, "mean": llm_losses.MEAN, "sum": llm_losses.SUM}
_rms_norm = torch.ops.gems.rms_norm.default


# norms -------------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, weight_after_cast: bool = True
) -> Tensor:
    """n = x / sqrt(mean(x^2) + eps); y = weight * dtype(n), or dtype(n * weight).

    weight_after_cast: n is rounded to x's dtype before the weight multiplies it (Llama); otherwise
                       n * weight is (Gemma, ``torch.nn.RMSNorm``)
    Shapes:  x [..., N]; weight [N] -> y [..., N]
    Dtypes:  float16, bfloat16, float32, float64; statistics in float32 at least. y has x's dtype;
             with weight_after_cast, that to which torch promotes x's and the weight's
    """
    _check_vector("weight", weight, x)
    return _rms_norm(x, weight, eps, weight_after_cast)[0]


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_after_cast: bool = True,
) -> tuple[Tensor, Tensor]:
    """h = x + residual, y = rms_norm(h, weight, eps, weight_after_cast); (y, h).

    Shapes:  x, residual [..., N]; weight [N] -> y, h [..., N]
    Dtypes:  as ``rms_norm``; h is rounded to its dtype before it is normed
    """
    _check_same("residual", residual, "x", x)
    _check_vector("weight", weight, x)
    return llm_ops.fused_add_rms_norm(x, residual, weight, eps, weight_after_cast)[:2]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """h = x + residual, y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias; (y, h).

    Shapes:  x, residual [..., N]; weight, bias [N] -> y, h [..., N]
    Dtypes:  float16, bfloat16, float32, float64; statistics in float32 at least. y has h's dtype
    """
    _check_same("residual", residual, "x", x)
    _check_vector("weight", weight, x)
    _check_vector("bias", bias, x)
    return llm_ops.add_layer_norm(x, residual, weight, bias, eps)[:2]


# activations -------------------------------------------------------------------------------------


def silu_and_mul(x: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with gate, up = the halves of x's last dim; or silu(x) * up.

    Shapes:  x [..., 2 D] -> [..., D]; x, up [..., D] -> [..., D]
    Dtypes:  float16, bfloat16, float32, float64; silu(gate) is rounded to its dtype
    """
    return _act_and_mul(x, up, "silu")


def gelu_and_mul(x: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, as ``silu_and_mul``; approximate: "none" (erf) or "tanh"."""
    if approximate not in ("none", "tanh"):
        raise ArgumentError(f"approximate is {approximate!r}; valid: 'none', 'tanh'")
    return _act_and_mul(x, up, approximate)


def _act_and_mul(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if up is not None:
        _check_same("up", up, "x", x)
        return llm_ops.act_and_mul(x, up, activation)
    if x.shape[-1] % 2:
        raise ArgumentError(f"x's last dim is {x.shape[-1]}, which has no two halves; pass up=")
    return llm_ops.packed_act_and_mul(x, activation)


# rotary embedding --------------------------------------------------------------------------------


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    heads_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Each pair (x1, x2) of the first R features turned by its angle:
    (x1 cos - x2 sin, x2 cos + x1 sin). The other D - R features stay.

    interleaved: pairs are neighbours (2i, 2i + 1), as in GPT-J; otherwise feature i and i + R / 2,
                 as in GPT-NeoX and Llama
    heads_dim:   1: q and k are [B, H, S, D], as attention takes them; 2: they are [B, S, H, D]
    Shapes:  q [B, Hq, S, D], k [B, Hk, S, D]; R <= D. cos and sin are either [S, R / 2], a number
             a pair; or [B, S, R] (or [1, S, R]), a number a feature, as ``transformers`` has them
    Dtypes:  float16, bfloat16, float32, float64; results have the dtype of what they were made of.
             Products and their sum round in the dtype to which torch promotes it and cos
    cos and sin have no gradient.
    """
    _check_rotary(q, k, cos, sin, heads_dim)
    return llm_ops.rotary(q, k, cos, sin, interleaved, heads_dim)


def _check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_dim: int) -> None:
    if heads_dim not in (1, 2):
        raise ArgumentError(f"heads_dim is {heads_dim}; valid: 1 ([B, H, S, D]), 2 ([B, S, H, D])")
    if q.dim() != 4 or k.dim() != 4:
        raise ArgumentError(f"q and k have {q.dim()} and {k.dim()} dims; each must have 4")
    _check_same("sin", sin, "cos", cos)
    if cos.dim() not in (2, 3):
        raise ArgumentError(f"cos has {cos.dim()} dims; valid: 2 ([S, R / 2]), 3 ([B, S, R])")
    length = q.shape[3 - heads_dim]
    if k.shape[3 - heads_dim] != length or cos.shape[-2] != length:
        raise ArgumentError(
            f"q, k and cos have {length}, {k.shape[3 - heads_dim]} and {cos.shape[-2]} positions; "
            "they must be alike: pass the rows of cos and sin for these positions"
        )
    turned = cos.shape[-1] * 2 if cos.dim() == 2 else cos.shape[-1]
    if turned % 2 or turned > q.shape[-1] or turned > k.shape[-1]:
        raise ArgumentError(
            f"cos turns {turned} features (twice its last dim if it has 2 dims); valid: an even "
            f"number up to {min(q.shape[-1], k.shape[-1])}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ArgumentError("cos or sin requires a gradient, and has none here: detach() them")


# losses ------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """-log softmax(z)[target], z = logits or softcap * tanh(logits / softcap).

    label_smoothing: the target's share s is spread: loss = (1 - s) loss + s mean(-log softmax(z))
    reduction: "mean" over the rows whose target is not ignore_index, "sum", or "none"
    A target that is neither that nor in [0, V) has a loss of NaN.
    Shapes:  logits [..., V] (classes last); target [...] of integers -> [] or [...]
    Dtypes:  float16, bfloat16, float32, float64; the loss is float32 at least
    Backward reads logits and two numbers a row; nothing else is saved.
    """
    number, cap = _check_loss(target, label_smoothing, reduction, softcap)
    if target.shape != logits.shape[:-1]:
        raise ArgumentError(
            f"target is {tuple(target.shape)} and logits {tuple(logits.shape)}; target must have "
            "their shape without the last dim, the classes"
        )
    rows = logits.reshape(-1, logits.shape[-1])
    more = ignore_index, label_smoothing, cap, number
    loss = llm_losses.cross_entropy(rows, target.reshape(-1), *more)[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """cross_entropy(hidden @ weight.T + bias, target, ...), never with all logits in memory.

    Forward takes ``chunk`` rows at a time, computes their logits, losses and gradients, and keeps
    the gradients of hidden, weight and bias: backward only multiplies them by that of the loss.
    chunk:   rows at a time; None: such that their logits take about as much memory as hidden
    reduction: "mean" or "sum"
    Shapes:  hidden [..., H]; weight [V, H]; bias [V]; target [...] of integers -> []
    Dtypes:  float16, bfloat16, float32, float64, one for hidden, weight and bias, or autocast's;
             the loss is float32 at least, and gradients of weight and bias are added up in it
    """
    if reduction == "none":
        raise ArgumentError("reduction is 'none'; valid: 'mean', 'sum'. cross_entropy has 'none'")
    number, cap = _check_loss(target, label_smoothing, reduction, softcap)
    parts: Sequence[Tensor | None] = (hidden, weight, bias)
    wanted = [torch.is_grad_enabled() and p is not None and p.requires_grad for p in parts]
    if under_autocast(hidden):  # as torch's linear
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_linear(hidden, weight, target, bias, chunk)
    rows, more = hidden.reshape(-1, hidden.shape[-1]), (ignore_index, label_smoothing, cap, number)
    return llm_losses.linear_cross_entropy(
        rows, weight, target.reshape(-1), bias, *more, chunk or 0, wanted
    )[0]


def _check_loss(
    target: Tensor, label_smoothing: float, reduction: str, softcap: float | None
) -> tuple[int, float]:
    """What the ops take for reduction and softcap."""
    if reduction not in _REDUCTIONS:
        raise ArgumentError(f"reduction is {reduction!r}; valid: 'mean', 'sum', 'none'")
    if target.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"target is {target.dtype}; valid: class indices, int64 or int32")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ArgumentError(f"label_smoothing is {label_smoothing}; valid: 0 to 1")
    if softcap is not None and not softcap > 0:
        raise ArgumentError(f"softcap is {softcap}; valid: a positive number, or None")
    return _REDUCTIONS[reduction], 0.0 if softcap is None else float(softcap)


def _check_linear(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, chunk: int | None
) -> None:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ArgumentError(
            f"weight is {tuple(weight.shape)}; it must be [classes, {hidden.shape[-1]}], for "
            f"hidden is {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(f"bias is {tuple(bias.shape)}; it must be [{weight.shape[0]}]")
    if target.shape != hidden.shape[:-1]:
        raise ArgumentError(
            f"target is {tuple(target.shape)}; it must be {tuple(hidden.shape[:-1])}, for hidden "
            f"is {tuple(hidden.shape)}"
        )
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise ArgumentError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; hidden, weight and bias must "
            "have one dtype: convert them, or use autocast"
        )
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"chunk is {chunk}; valid: a positive number of rows, or None")


# routing -----------------------------------------------------------------------------------------


def topk_softmax(router_logits: Tensor, k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest entries of softmax(router_logits) and their places, largest first.

    renormalize: each row of weights is divided by its sum
    Shapes:  router_logits [..., E] -> weights, indices [..., k]; of equal entries the first comes
             first
    Dtypes:  float16, bfloat16, float32, float64; weights are float32 at least, indices int64
    """
    experts = router_logits.shape[-1]
    if not 1 <= k <= experts:
        raise ArgumentError(f"k is {k}; valid: 1 to {experts}, the number of experts")
    return llm_ops.topk_softmax(router_logits, k, renormalize)


# arguments ---------------------------------------------------------------------------------------


def _check_same(name: str, t: Tensor, other: str, like: Tensor) -> None:
    if t.shape != like.shape:
        raise ArgumentError(
            f"{name} is {tuple(t.shape)} and {other} {tuple(like.shape)}; they must be alike"
        )


def _check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is not None and vector.shape != x.shape[-1:]:
        raise ArgumentError(
            f"{name} is {tuple(vector.shape)}; it must be [{x.shape[-1]}], for x is "
            f"{tuple(x.shape)}"
        )
