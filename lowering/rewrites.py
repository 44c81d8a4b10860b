"""The table of rewrites: chains whose answer is another algorithm.

The programs that must fire, and those that look alike and must not, stand beside each rewrite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Proxy

from ..kernels.op import T
from .graph import all_same, is_tensor, same, value_of
from .llm_rewrites import LINEAR_CROSS_ENTROPY, ROUTING
from .rewrite import Match, Rewrite, either, o, sample, through

aten = torch.ops.aten

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)

# --- attention ---------------------------------------------------------------------------------


def attention_pattern(
    q: Any, kt: Any, v: Any, dim: Any, factor: Any, divisor: Any, mask: Any, bias: Any,
    hidden: Any, keep: Any, fill: Any,
) -> Any:  # fmt: skip
    """softmax(q @ kt * factor + mask) @ v in each of its spellings; absent parts stay unbound."""
    product = through("cast", o.matmul(q, kt))
    scores: Any = either(o.mul(product, factor), o.div(product, divisor), product)
    scores = through("cast", scores)
    masked = either(
        o.add(scores, mask),
        o.add(o.add(scores, bias), mask),
        o.masked_fill(scores, hidden, fill),
        o.where(keep, scores, fill),
        scores,
    )
    probabilities = through("cast", "dropout", o.softmax(through("cast", masked), dim))
    return o.matmul(probabilities, v)


def attention(
    match: Match, q: Any, kt: Any, v: Any, dim: Any, factor: Any, divisor: Any, mask: Any,
    bias: Any, hidden: Any, keep: Any, fill: Any,
) -> Any:  # fmt: skip
    """scaled_dot_product_attention; 3-D operands get a dimension of one head."""
    k = _transposed(match, kt)
    scale = float(factor) if factor is not None else 1.0 / float(divisor or 1.0)
    name = next((n for n in ("mask", "hidden", "keep") if match[n] is not None), None)
    if name == "hidden":
        mask = aten.logical_not.default(hidden) if fill == -math.inf else _addend(match, hidden)
    elif name == "keep":
        mask = keep if fill == -math.inf else _addend(match, aten.logical_not.default(keep))
    one_head = match.value("q").dim() == 3
    rank = 0 if name is None else match.value(name).dim()
    if bias is not None:
        mask, rank = aten.add.Tensor(bias, mask), max(rank, match.value("bias").dim())
    if rank == 3:
        mask = aten.unsqueeze.default(mask, 1 if one_head else 0)
    if one_head:
        q, k, v = (aten.unsqueeze.default(x, 1) for x in (q, k, v))
    result = aten.scaled_dot_product_attention.default(q, k, v, mask, 0.0, False, scale=scale)
    result = aten.squeeze.dim(result, 1) if one_head else result
    if _is_only_reshaped(match):
        return result
    # a fused kernel may give [B, L, H, D] memory, on which a view() that eager allows would fail
    return aten.clone.default(result, memory_format=torch.contiguous_format)


def _transposed(match: Match, kt: Proxy) -> Proxy:
    reading, rank = match.reader(kt.node), match.value("kt").dim()
    if reading is not None and reading.word == "transpose":
        source, *dims = reading.args
        if {d % rank for d in dims} == {rank - 1, rank - 2}:
            return Proxy(source, kt.tracer)
    return aten.transpose.int(kt, -2, -1)


def _addend(match: Match, hidden: Proxy) -> Proxy:
    """A bool mask as what to add to the scores: ``fill`` where hidden, 0 elsewhere."""
    dtype = _product(match).dtype
    return aten.mul.Tensor(aten._to_copy.default(hidden, dtype=dtype), match["fill"])


def _is_only_reshaped(match: Match) -> bool:
    """Whether all readers copy or reshape the transposed result, which hides its strides."""
    if "val" in match.root.meta:
        return False  # an ATen graph: later nodes have been traced with these strides
    for user in match.root.users:
        if user.target != "transpose" or user.args[1:] not in ((1, 2), (2, 1)):
            return False
        if any(reader.target not in ("contiguous", "reshape") for reader in user.users):
            return False
    return True


def check_attention(match: Match) -> str | None:
    q, kt, v, out = (*map(match.value, ("q", "kt", "v")), value_of(match.root))
    if not all(map(is_tensor, (q, kt, v, out))):
        return "the graph holds no value for an operand"
    if q.dim() not in (3, 4) or not q.dim() == kt.dim() == v.dim():
        return f"operands have {q.dim()}, {kt.dim()} and {v.dim()} dims, not 3 or 4 alike"
    if not (all_same(q.shape[:-2], kt.shape[:-2]) and all_same(q.shape[:-2], v.shape[:-2])):
        return "the batch dims of q, k and v differ"
    return (
        _why_not_softmax(match)
        or _why_not_dtypes(match)
        or _why_not_scale(match)
        or _why_not_mask(match)
        or _why_not_kernel(q, kt, v, out.dtype)
    )


def _product(match: Match) -> Any:
    """The value of q @ kt."""
    return value_of(next(node for node, _ in match.read("matmul") if node is not match.root))


def _scores(match: Match) -> Any:
    return value_of(match.read("softmax")[0][0])


def _why_not_softmax(match: Match) -> str | None:
    rank, dim = _scores(match).dim(), match["dim"]
    if type(dim) is not int or dim % rank != rank - 1:
        return f"softmax runs over dim {dim}, not over the keys"
    for node, reading in match.read("dropout"):
        if reading.args[1] != 0 and reading.args[2]:
            return f"{node.name} is active: its random numbers would be others"
    return None


def _why_not_dtypes(match: Match) -> str | None:
    """One dtype in and out, and never a narrower one in between.

    Operands in float32 with 16-bit products mean autocast, which casts for attention as well.
    """
    out = value_of(match.root).dtype
    operands = {match.value(name).dtype for name in ("q", "kt", "v")}
    allowed = {out, torch.float32} if out in _SIXTEEN_BITS else {out}
    if not out.is_floating_point or _product(match).dtype != out or not operands <= allowed:
        found = ", ".join(str(match.value(name).dtype)[6:] for name in ("q", "kt", "v"))
        return f"q, k and v are {found} and the result {str(out)[6:]}"
    for node in match.nodes:
        value = value_of(node)
        if is_tensor(value) and value.dtype != out:
            if value.dtype in _SIXTEEN_BITS or torch.finfo(value.dtype).bits < 32:
                return f"{node.name} is {value.dtype} in a chain that gives {out}"
            if out == torch.float64:
                return f"{node.name} rounds to {value.dtype} in a float64 chain"
    return None


def _why_not_scale(match: Match) -> str | None:
    for scale in (match["factor"], match["divisor"]):
        if scale is not None and type(scale) not in (int, float):
            return "the scale is a tensor, not a number"
        if scale is not None and (not math.isfinite(scale) or scale == 0):
            return f"the scale is {scale}"
    return None


def _why_not_mask(match: Match) -> str | None:
    names = [n for n in ("mask", "bias", "hidden", "keep") if match[n] is not None]
    reasons = (_why_not_one_mask(match, name) for name in names)
    return next((reason for reason in reasons if reason is not None), None)


def _why_not_one_mask(match: Match, name: str) -> str | None:
    mask, fill, additive = match.value(name), match["fill"], name in ("mask", "bias")
    if not is_tensor(mask):
        return "what is added to the scores is a number"
    if additive and mask.dtype != _product(match).dtype:
        return f"the mask is {mask.dtype}, the scores are {_product(match).dtype}"
    if not additive and mask.dtype != torch.bool:
        return "the mask is not bool"
    if not additive and type(fill) not in (int, float):
        return "hidden scores are filled with a tensor, not with a number"
    if not additive and fill != -math.inf and not -3.5e38 < fill < -1e30:
        # adding it must absorb any score, so that a row with no visible key stays uniform
        return f"hidden scores are filled with {fill}, not with -inf or about -3e38"
    scores, q, kt = _scores(match), match.value("q"), match.value("kt")
    if not all_same(scores.shape, (*q.shape[:-1], kt.shape[-1])):
        return "the mask makes the scores larger"
    if mask.device != q.device or mask.dim() < 2:
        return f"the mask has {mask.dim()} dims and is on {mask.device}"
    sizes = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    if not all(same(m, s) or same(m, 1) for m, s in sizes):
        return f"a mask of shape {tuple(mask.shape)} for scores of {tuple(scores.shape)}"
    return None


def _why_not_kernel(q: Any, kt: Any, v: Any, dtype: torch.dtype) -> str | None:
    """On a GPU: why no fused kernel would take it, or why it would be less accurate."""
    if q.device.type == "cpu":
        return None
    if dtype == torch.float64:
        return "there is no fused kernel for float64"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        # measured on an H100: up to ten times the error of two float32 matmuls
        return "the fused kernel multiplies float32 in parts of TF32, which is less exact"
    step = 8 if dtype in _SIXTEEN_BITS else 4
    if any(_hint(n) % step for n in (q.shape[-1], v.shape[-1])):
        return f"heads of {q.shape[-1]} and {v.shape[-1]} features are no multiple of {step}"
    if not (same(q.stride(-1), 1) and same(kt.stride(-2), 1) and same(v.stride(-1), 1)):
        return "the features of a head are not next to each other in memory"
    return None


def _hint(size: Any) -> int:
    """A size, or what it is in this call: any other value is as right, if slower; adds no guard."""
    return size if isinstance(size, int) else (size.node.hint or 0)


def _llama_attention(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=True)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def _gpt_head(q: Any, k: Any, v: Any) -> Any:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v


def _scaled_query(q: Any, k: Any, v: Any) -> Any:
    return (q * 0.25).matmul(k.mT).softmax(-1).matmul(v)


def _t5_attention(q: Any, k: Any, v: Any, bias: Any) -> Any:
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def _bias_and_mask(q: Any, k: Any, v: Any, bias: Any, mask: Any) -> Any:
    scores = torch.matmul(q, k.transpose(2, 3)) * 1.0 + bias
    return torch.matmul(torch.softmax(scores + mask, dim=-1), v)


def _where_finite(q: Any, k: Any, v: Any) -> Any:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = torch.where(seen, 0.25 * torch.matmul(q, k.transpose(-1, -2)), -3e38)
    return torch.matmul(torch.softmax(scores, -1), v).view(-1, v.shape[-1])


def _softmax_over_queries(q: Any, k: Any, v: Any) -> Any:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.25, -2), v)


def _weights_returned(q: Any, k: Any, v: Any) -> Any:
    weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.25, -1)
    return torch.matmul(weights, v), weights


def _scores_returned(q: Any, k: Any, v: Any) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, -1), v), scores


def _soft_capped(q: Any, k: Any, v: Any) -> Any:
    scores = torch.tanh(torch.matmul(q, k.transpose(-1, -2)) / 50) * 50
    return torch.matmul(torch.softmax(scores, -1), v)


def _tensor_scale(q: Any, k: Any, v: Any, scale: Any) -> Any:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * scale, -1), v)


def _mask_enlarges(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = torch.matmul(q, k.transpose(-1, -2)) + mask
    return torch.matmul(torch.softmax(scores, -1), v)


def _active_dropout(q: Any, k: Any, v: Any) -> Any:
    weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1)
    return torch.matmul(F.dropout(weights, 0.5, training=True), v)


def _small_fill(q: Any, k: Any, v: Any) -> Any:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = torch.matmul(q, k.transpose(-1, -2)).masked_fill(hidden, -100.0)
    return torch.matmul(torch.softmax(scores, -1), v)


def _value_written(q: Any, k: Any, v: Any) -> Any:
    scores, v = torch.matmul(q, k.transpose(-1, -2)), v.clone()
    weights = torch.softmax(scores, -1)
    q = q.clone().mul_(2)
    return torch.matmul(weights, v) + q


def _shared_key(q: Any, k: Any, v: Any) -> Any:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v)


_HEADS = (T(2, 3, 8, 16), T(2, 3, 12, 16), T(2, 3, 12, 16))
_ONE = (T(2, 8, 16), T(2, 8, 16), T(2, 8, 16))

ATTENTION = Rewrite(
    name="attention",
    pattern=attention_pattern,
    replacement=attention,
    because="the [L, S] scores are never written to memory",
    samples=(
        sample(_llama_attention, *_HEADS, T(2, 1, 8, 12)),
        sample(_gpt_head, *_ONE),
        sample(_scaled_query, *_HEADS),
        sample(_t5_attention, *_HEADS, T(1, 3, 8, 12)),
        sample(_bias_and_mask, *_HEADS, T(3, 8, 12), T(2, 1, 1, 12)),
        sample(_where_finite, *_HEADS),
    ),
    leaves_alone=(
        sample(_softmax_over_queries, *_HEADS),
        sample(_weights_returned, *_HEADS),
        sample(_scores_returned, *_HEADS),
        sample(_soft_capped, *_HEADS),
        sample(_tensor_scale, *_HEADS, T()),
        sample(_mask_enlarges, *_HEADS, T(4, 1, 1, 8, 12)),
        sample(_mask_enlarges, *_HEADS, T(12)),
        sample(_active_dropout, *_HEADS),
        sample(_small_fill, *_HEADS),
        sample(_value_written, *_HEADS),
        sample(_shared_key, T(2, 3, 8, 16), T(2, 1, 8, 16), T(2, 1, 8, 16)),
    ),
    check=check_attention,
)

# --- RMS norm ----------------------------------------------------------------------------------


def _normed(x: Any, eps: Any, dim: Any, keepdim: Any) -> Any:
    """x * rsqrt(mean(x^2) + eps)"""
    wide = through("cast", x)
    square = either(o.square(wide), o.mul(wide, wide))
    return o.mul(o.rsqrt(o.add(o.mean(square, dim, keepdim), eps)), wide)


def rms_norm_pattern(x: Any, weight: Any, eps: Any, dim: Any, keepdim: Any) -> Any:
    """Llama, Mistral, Qwen3, T5: the weight multiplies what was cast back."""
    return o.mul(through("cast", _normed(x, eps, dim, keepdim)), weight)


def wide_rms_norm_pattern(x: Any, weight: Any, eps: Any, dim: Any, keepdim: Any) -> Any:
    """Gemma: the weight multiplies in float32, then the product is cast back."""
    return o.cast(o.mul(_normed(x, eps, dim, keepdim), weight))


def rms_norm(match: Match, x: Any, weight: Any, eps: Any, dim: Any, keepdim: Any) -> Any:
    return torch.ops.gems.rms_norm.default(x, weight, float(eps), True)[0]


def wide_rms_norm(match: Match, x: Any, weight: Any, eps: Any, dim: Any, keepdim: Any) -> Any:
    return torch.ops.gems.rms_norm.default(x, weight, float(eps), False)[0]


def check_rms_norm(match: Match) -> str | None:
    x, weight, dim = match.value("x"), match.value("weight"), match["dim"]
    if not (is_tensor(x) and is_tensor(weight)):
        return "x or the weight is no tensor"
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    if not all(type(d) is int for d in dims) or [d % x.dim() for d in dims] != [x.dim() - 1]:
        return f"the mean runs over dim {dim}, not over the last one"
    if match["keepdim"] is not True:
        return "the mean drops the dim"
    if type(match["eps"]) not in (int, float):
        return "eps is no number"
    if weight.dim() != 1 or not same(weight.shape[0], x.shape[-1]) or weight.device != x.device:
        return "the weight is no vector over the last dim"
    return _why_not_norm_dtypes(match)


def _why_not_norm_dtypes(match: Match) -> str | None:
    """Statistics in float32, the norm cast back to the dtype that x came in."""
    x, root = match.value("x").dtype, match.root
    if x not in (*_SIXTEEN_BITS, torch.float32):
        return f"x is {x}"
    ((mean, _),) = match.read("mean")
    if value_of(mean).dtype != torch.float32:
        return f"the mean is taken in {value_of(mean).dtype}"
    if match.rule.pattern is wide_rms_norm_pattern:
        dtype = value_of(root).dtype
        return None if dtype == x else f"the result is cast to {dtype}, x is {x}"
    normed = next(arg for arg in match.readings[root].args if arg in match.readings)
    dtype = value_of(normed).dtype
    return None if dtype == x else f"the weight multiplies {dtype}, x is {x}"


def _llama_norm(x: Any, weight: Any) -> Any:
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    return weight * (h * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def _t5_norm(x: Any, weight: Any) -> Any:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype)


def _gemma_norm(x: Any, weight: Any) -> Any:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


def _squared_by_hand(x: Any, weight: Any) -> Any:
    h = x.float()
    return ((h * h).mean(dim=-1, keepdim=True) + 1e-5).rsqrt().mul(h).to(x.dtype) * weight


def _mean_over_rows(x: Any, weight: Any) -> Any:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + 1e-6)).to(x.dtype)


def _eps_inside(x: Any, weight: Any) -> Any:
    h = x.float()
    return weight * (h * torch.rsqrt((h + 1e-6).pow(2).mean(-1, keepdim=True))).to(x.dtype)


def _scale_returned(x: Any, weight: Any) -> Any:
    h = x.float()
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (h * rstd).to(x.dtype), rstd


def _cubed(x: Any, weight: Any) -> Any:
    h = x.float()
    return weight * (h * torch.rsqrt(h.abs().pow(3).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _other_normed(x: Any, weight: Any) -> Any:
    h = x.float()
    return weight * ((h + 1) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _matrix_weight(x: Any, weight: Any) -> Any:
    return _llama_norm(x, weight.expand(x.shape[-2], -1))


_ROWS = (T(2, 6, 32), T(32))

_NORM_LOOKALIKES = (
    sample(_mean_over_rows, *_ROWS),
    sample(_eps_inside, *_ROWS),
    sample(_scale_returned, *_ROWS),
    sample(_cubed, *_ROWS),
    sample(_other_normed, *_ROWS),
    sample(_matrix_weight, *_ROWS),
)

RMS_NORM = Rewrite(
    name="rms_norm",
    pattern=rms_norm_pattern,
    replacement=rms_norm,
    because="one op instead of six to trace and differentiate; only x and rstd are saved",
    samples=(
        sample(_llama_norm, *_ROWS),
        sample(_llama_norm, T(2, 3, 4, 16), T(16)),
        sample(_t5_norm, *_ROWS),
        sample(_squared_by_hand, *_ROWS),
    ),
    leaves_alone=_NORM_LOOKALIKES,
    check=check_rms_norm,
)

WIDE_RMS_NORM = Rewrite(
    name="wide_rms_norm",
    pattern=wide_rms_norm_pattern,
    replacement=wide_rms_norm,
    because="one op instead of six to trace and differentiate; only x and rstd are saved",
    samples=(sample(_gemma_norm, *_ROWS),),
    leaves_alone=_NORM_LOOKALIKES,
    check=check_rms_norm,
)

#: The wide form first: the other one would see its inner part.
TABLE = (ATTENTION, WIDE_RMS_NORM, RMS_NORM, ROUTING)
#: With what saves memory and may take time: options={"rewrites": "memory"}
MEMORY = (*TABLE, LINEAR_CROSS_ENTROPY)
