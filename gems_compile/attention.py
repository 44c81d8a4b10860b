"""Attention in eager mode: rules of the overloads that ``scaled_dot_product_attention`` comes to.

That function itself is a composite, behind which autograd lies; it chooses a backend, and the
backend's forward and backward are ops on the device. Each rule here computes what one of them
returns, laid out as ATen's, with ``gems::attention``: a program of the host, for some of the
results are numbers and tensors that no kernel fills. See ``sized``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .lowering.overload import find_overload
from .sized import Steps
from .whole import wide

#: those whose causal mask ends at the last key and not at the diagonal, or might
UNLIKE_DIAGONAL = ("flash", "cudnn")


def why_native(overload: torch._ops.OpOverload, args: Sequence[Any], kwargs: Any) -> str | None:
    """Why a call of one of ``ATTENTION`` is ATen's, or None; the kernels decline others."""
    names = [a.name for a in overload._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = [given["query"], given["key"], given["value"]]
    if given.get("dropout_p", 0.0) != 0.0:
        return "dropout: its mask is ATen's"
    if given.get("return_debug_mask", False):
        return "the mask of a dropout is wanted"
    if given.get("grad_input_mask", [False])[-1]:
        return "the gradient of the bias is wanted"
    if any(t.ndim != 4 or t.numel() == 0 for t in tensors):
        return "its operands are empty, or not of four dims"
    scale = given.get("scale")
    if scale is not None and not 0 < scale < math.inf:
        return f"a scale of {scale}"
    like = LIKE[overload]
    unequal = tensors[0].shape[2] != tensors[1].shape[2]
    if like in UNLIKE_DIAGONAL and given.get("is_causal", False) and unequal:
        return "a causal mask of which the diagonal is not the middle"
    if like in UNLIKE_DIAGONAL and tensors[0].dtype == torch.float32:
        return "float32, which ATen's refuses"
    if like == "efficient" and tensors[0].shape[1] != tensors[1].shape[1]:
        return "unequal heads, which ATen's refuses"
    return None


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


def _gradients(steps: Steps, do: Tensor, *given: Any) -> Any:
    if do.stride(-1) != 1:  # of a sum, say
        do = do.contiguous()
    return steps(_backward, do, *given)


# ATen's overloads --------------------------------------------------------------------------------


def flash(
    steps: Steps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    out, lse = steps(_forward, q, k, v, None, *_how(q, is_causal, scale, "flash"))
    state, unused = (q.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return out, lse, None, None, q.shape[2], k.shape[2], state, unused, q.new_empty(0)


def flash_backward(
    steps: Steps,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *seed: Any,
    scale: float | None = None,
) -> Any:
    how = _how(q, is_causal, scale, "flash")
    return _gradients(steps, do, q, k, v, None, out, lse, *how)


def efficient(
    steps: Steps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    out, lse = steps(_forward, q, k, v, bias, *_how(q, is_causal, scale, "efficient"))
    if not compute_log_sumexp:
        lse = lse.new_empty((*lse.shape[:2], 0))
    return out, lse, *(q.new_empty((), dtype=torch.int64) for _ in range(2))


def efficient_backward(
    steps: Steps,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    philox_seed: Any,
    philox_offset: Any,
    dropout_p: float,
    grad_input_mask: Sequence[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    how = _how(q, is_causal, scale, "efficient")
    return *_gradients(steps, do, q, k, v, bias, out, lse, *how), None


def cudnn(
    steps: Steps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    out, lse = steps(_forward, q, k, v, bias, *_how(q, is_causal, scale, "cudnn"))
    seed, offset = (q.new_empty((), dtype=torch.int64) for _ in range(2))
    lse = lse if compute_log_sumexp else None
    return out, lse, None, None, q.shape[2], k.shape[2], seed, offset, None


def cudnn_backward(
    steps: Steps,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    philox_seed: Any,
    philox_offset: Any,
    bias: Tensor | None,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> Any:
    how = _how(q, is_causal, scale, "cudnn")
    return _gradients(steps, do, q, k, v, bias, out, lse, *how)


def cpu(
    steps: Steps,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    return steps(_forward, q, k, v, attn_mask, *_how(q, is_causal, scale, "cpu"))


def cpu_backward(
    steps: Steps,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    how = _how(q, is_causal, scale, "cpu")
    return _gradients(steps, do, q, k, v, attn_mask, out, lse, *how)


_RULES: dict[str, tuple[str, Callable[..., Any]]] = {
    "flash_attention": ("flash", flash),
    "flash_attention_backward": ("flash", flash_backward),
    "efficient_attention": ("efficient", efficient),
    "efficient_attention_backward": ("efficient", efficient_backward),
    "cudnn_attention": ("cudnn", cudnn),
    "cudnn_attention_backward": ("cudnn", cudnn_backward),
    "flash_attention_for_cpu": ("cpu", cpu),
    "flash_attention_for_cpu_backward": ("cpu", cpu_backward),
}
_FOUND = {find_overload(f"aten._scaled_dot_product_{n}.default"): r for n, r in _RULES.items()}

#: the rule of each of ATen's overloads that this torch has
ATTENTION = {overload: rule for overload, (_, rule) in _FOUND.items() if overload is not None}
#: and whose layouts its results have: see ``kernels.attention_ops``
LIKE = {overload: like for overload, (like, _) in _FOUND.items() if overload is not None}
