"""The elementwise and row-wise ops of language models: see ``gems_compile.llm`` for what they take.

Each is written as models write it, so that it rounds where they round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .own_ops import gradient_of, own_op

aten, gems = torch.ops.aten, torch.ops.gems


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which statistics are computed."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


# norms of a residual sum -------------------------------------------------------------------------


@own_op(
    "fused_add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps,"
    " bool weight_after_cast) -> (Tensor y, Tensor h, Tensor rstd)"
)
def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_after_cast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    h = x + residual
    y, rstd = gems.rms_norm.default(h, weight, eps, weight_after_cast)
    return y, h, rstd


@gradient_of(
    fused_add_rms_norm,
    "fused_add_rms_norm_backward(Tensor? dy, Tensor? dh, Tensor h, Tensor rstd, Tensor? weight,"
    " bool weight_after_cast) -> (Tensor dsum, Tensor dweight)",
    gradients={"x": "dsum", "residual": "dsum"},
)
def fused_add_rms_norm_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_after_cast: bool,
) -> tuple[Tensor, Tensor]:
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dw = gems.rms_norm_backward.default(dy, h, rstd, weight, weight_after_cast)
    return dx if dh is None else dx + dh, dw


@own_op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x + residual
    var, mean = torch.var_mean(wide(h), -1, correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    y = (wide(h) - mean) * rstd
    y = y if weight is None else y * wide(weight)
    y = y if bias is None else y + wide(bias)
    return y.to(h.dtype), h, mean, rstd


@gradient_of(
    add_layer_norm,
    "add_layer_norm_backward(Tensor? dy, Tensor? dh, Tensor h, Tensor mean, Tensor rstd,"
    " Tensor? weight, Tensor? bias) -> (Tensor dsum, Tensor dweight, Tensor dbias)",
    gradients={"x": "dsum", "residual": "dsum"},
)
def add_layer_norm_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = torch.zeros_like(h) if dy is None else dy
    g = wide(dy)
    dn = g if weight is None else g * wide(weight)
    n = (wide(h) - mean) * rstd
    dx = rstd * (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True))
    dx = dx.to(h.dtype)
    rows = list(range(h.dim() - 1))
    dw = h.new_empty(0) if weight is None else _over_rows(g * n, rows).to(weight.dtype)
    db = h.new_empty(0) if bias is None else _over_rows(g, rows).to(bias.dtype)
    return dx if dh is None else dx + dh, dw, db


def _over_rows(x: Tensor, rows: list[int]) -> Tensor:
    return x.sum(rows) if rows else x  # a sum over no dims would be one over all


# gated activations -------------------------------------------------------------------------------


def _activated(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate=activation)


def _gradients(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    d = dy * up
    if activation == "silu":
        return aten.silu_backward.default(d, gate), dy * F.silu(gate)
    dgate = aten.gelu_backward.default(d, gate, approximate=activation)
    return dgate, dy * F.gelu(gate, approximate=activation)


@own_op("act_and_mul(Tensor gate, Tensor up, str activation) -> Tensor y")
def act_and_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _activated(gate, activation) * up


@gradient_of(
    act_and_mul,
    "act_and_mul_backward(Tensor dy, Tensor gate, Tensor up, str activation)"
    " -> (Tensor dgate, Tensor dup)",
)
def act_and_mul_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return _gradients(dy, gate, up, activation)


@own_op("packed_act_and_mul(Tensor x, str activation) -> Tensor y")
def packed_act_and_mul(x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return _activated(gate, activation) * up


@gradient_of(
    packed_act_and_mul,
    "packed_act_and_mul_backward(Tensor dy, Tensor x, str activation) -> Tensor dx",
)
def packed_act_and_mul_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.cat(_gradients(dy, gate, up, activation), -1)


# rotary embedding --------------------------------------------------------------------------------


@own_op(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, int heads_dim)"
    " -> (Tensor q_out, Tensor k_out)"
)
def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, heads_dim: int
) -> tuple[Tensor, Tensor]:
    tables = _tables(cos, sin, interleaved, heads_dim)
    return _rotated(q, *tables, interleaved), _rotated(k, *tables, interleaved)


@gradient_of(
    rotary,
    "rotary_backward(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, bool interleaved,"
    " int heads_dim) -> (Tensor dq, Tensor dk)",
)
def rotary_backward(
    dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, heads_dim: int
) -> tuple[Tensor, Tensor]:
    """The transposed rotation: where y = (x1 c1 - x2 s1, x2 c2 + x1 s2), it is
    dx = (dy1 c1 + dy2 s2, dy2 c2 - dy1 s1)."""
    c1, c2, s1, s2 = _tables(cos, sin, interleaved, heads_dim)
    back = c1, c2, -s2, -s1
    return _rotated(dq_out, *back, interleaved), _rotated(dk_out, *back, interleaved)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """What is rotated together: the halves of a row, or neighbours in it."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _tables(
    cos: Tensor, sin: Tensor, interleaved: bool, heads_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(cos, cos, sin, sin) of the first and the second of each pair, as q is laid out."""
    if cos.dim() == 2:  # [S, R / 2]
        cos, sin = (t.unsqueeze(0).unsqueeze(heads_dim) for t in (cos, sin))
        return cos, cos, sin, sin
    (c1, c2), (s1, s2) = (_pairs(t.unsqueeze(heads_dim), interleaved) for t in (cos, sin))
    return c1, c2, s1, s2


def _rotated(
    x: Tensor, c1: Tensor, c2: Tensor, s1: Tensor, s2: Tensor, interleaved: bool
) -> Tensor:
    size = 2 * c1.shape[-1]
    partial = size != x.shape[-1]
    x1, x2 = _pairs(x[..., :size] if partial else x, interleaved)
    turned = (x1 * c1 - x2 * s1).to(x.dtype), (x2 * c2 + x1 * s2).to(x.dtype)
    parts = [torch.stack(turned, -1).flatten(-2)] if interleaved else [*turned]
    return torch.cat([*parts, x[..., size:]] if partial else parts, -1)


# routing -----------------------------------------------------------------------------------------


@own_op("topk_softmax(Tensor logits, int k, bool renormalize) -> (Tensor weights, Tensor indices)")
def topk_softmax(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    left = torch.softmax(wide(logits), -1)
    expert = torch.arange(logits.shape[-1], device=logits.device)
    best = []
    for _ in range(k):
        best.append(left.max(-1, keepdim=True))
        left = torch.where(expert == best[-1].indices, -1.0, left)
    total = sum(weight for weight, _ in best)
    place = torch.arange(k, device=logits.device)
    weights, indices = best[0]
    for j, (weight, index) in enumerate(best):
        weight = weight / total if renormalize else weight
        weights = torch.where(place == j, weight, weights)
        indices = torch.where(place == j, index, indices)
    return weights, indices


@gradient_of(
    topk_softmax,
    "topk_softmax_backward(Tensor? dweights, Tensor logits, Tensor indices, bool renormalize)"
    " -> Tensor dlogits",
)
def topk_softmax_backward(
    dweights: Tensor | None, logits: Tensor, indices: Tensor, renormalize: bool
) -> Tensor:
    """Renormalized weights are a softmax of the chosen logits; others are entries of one.

    The weights are computed again: models divide them by their sum in place.
    """
    if dweights is None:
        return torch.zeros_like(logits)
    z, expert = wide(logits), torch.arange(logits.shape[-1], device=logits.device)
    d, chosen = torch.zeros_like(z), torch.full_like(z, float("-inf"))
    for dweight, index in zip(dweights.split(1, -1), indices.split(1, -1), strict=True):
        here = expert == index  # no expert twice
        d = torch.where(here, dweight, d)
        chosen = torch.where(here, z, chosen)
    p = torch.softmax(chosen if renormalize else z, -1)
    return (p * (d - (p * d).sum(-1, keepdim=True))).to(logits.dtype)
