"""The fused groups of language models that are timed: norms, softmax, losses, activations.

See ``benchmarks.group`` for what a declaration says.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.group import Aim, T, group

plain = partial(T, grad=False)
wide = partial(T, dtype=torch.float32)
ids = partial(T, dtype=torch.int64, grad=False)


# ------------------------------------------------------------------------------ norms of rows

ROWS = {(16384, 4096): (6, 40), (8192, 8192): (5, 72), (131072, 128): (20, 16)}
TOKENS = {(8192, 4096): (6, 40)}


# between 2^24 and 2^26 the H200's L2 cache ceases to hold a copy: time is no line there
COPIED = [2**20, 2**22, 2**24, 3 * 2**23, 2**26, 2**28, 2**29]


@group(
    "copy",
    {(n,): (n >> 14,) for n in COPIED},
    lambda n: [plain((n,))],
    forward=("other", lambda n: 4 * n),
)
def copy(x: Tensor) -> Tensor:
    """A kernel that reads and writes each number; a memcpy in a CUDA graph has half its speed."""
    return x.neg()


@group(
    "rms_norm",
    ROWS,
    lambda m, n: [T((m, n)), T((n,))],
    forward=("row", lambda m, n: 4 * m * n + 2 * n),  # read x, weight; write y
    backward=("norm_backward", lambda m, n: 6 * m * n + 4 * n),  # x, dy, weight; dx, dweight
)
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


@group(
    "layer_norm",
    ROWS,
    lambda m, n: [T((m, n)), T((n,)), T((n,))],
    forward=("row", lambda m, n: 4 * m * n + 4 * n),
    backward=("norm_backward", lambda m, n: 6 * m * n + 6 * n),  # and dbias
)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


@group(
    "add_rms_norm",
    TOKENS,
    lambda m, n: [T((m, n)), T((m, n)), T((n,))],
    forward=("row", lambda m, n: 8 * m * n + 2 * n),  # x, residual; y, h
    # h, dy, dh, weight; one gradient for x and residual, dweight
    backward=("norm_backward", lambda m, n: 8 * m * n + 4 * n),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's residual stream and its norm, as transformers writes it."""
    hidden = x + residual
    wider = hidden.to(torch.float32)
    normed = wider * torch.rsqrt(wider.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * normed.to(hidden.dtype), hidden


@group(
    "dropout_add_layer_norm",
    TOKENS,
    lambda m, n: [T((m, n)), T((m, n)), T((n,)), T((n,))],
    dropout=True,
    forward=("row", lambda m, n: 6 * m * n + 4 * n),  # x, residual; y
    backward=("norm_backward", lambda m, n: 8 * m * n + 6 * n),  # h, dy; dx, dresidual
)
def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float = 0.1
) -> Tensor:
    """BERT's output block."""
    return F.layer_norm(F.dropout(x, p) + residual, x.shape[-1:], weight, bias, 1e-12)


# ---------------------------------------------------------------- softmax, loss, whole rows

SCORES = {(32768, 4096): (6, 40), (8192, 65536): (3, 300)}
VOCABULARIES = {(8192, 128256): (5, 130), (8192, 50257): (5, 57)}
SOFTMAX: dict[str, Aim] = {
    "forward": ("row", lambda m, n: 4 * m * n),  # x; y
    "backward": ("row", lambda m, n: 6 * m * n),  # y, dy; dx
}


@group("softmax", SCORES, lambda m, n: [T((m, n))], **SOFTMAX)
def softmax(x: Tensor) -> Tensor:
    return F.softmax(x, -1)


@group("log_softmax", SCORES, lambda m, n: [T((m, n))], **SOFTMAX)
def log_softmax(x: Tensor) -> Tensor:
    return F.log_softmax(x, -1)


@group(
    "cross_entropy",
    VOCABULARIES,
    lambda m, n: [T((m, n)), ids((m,), high=n)],
    forward=("row", lambda m, n: 2 * m * n + 8 * m),  # logits, int64 labels; a scalar
    train=("loss", lambda m, n: 4 * m * n + 8 * m),  # and the gradient of the logits
)
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of transformers' causal models, which widens the logits."""
    return F.cross_entropy(logits.to(torch.float32), labels)


@group(
    "t5_softmax",
    {(16, 12, 512, 512): (2, 2, 6, 10)},
    lambda b, h, q, k: [plain((b, h, q, k)), plain((1, h, q, k)), ids((b, k), high=4)],
    # scores, bias, int64 padding mask; p
    forward=("row", lambda b, h, q, k: 4 * b * h * q * k + 2 * h * q * k + 8 * b * k),
)
def t5_softmax(scores: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Causal and padding mask, position bias and softmax of a T5 decoder."""
    rows = torch.arange(scores.shape[-2], device=scores.device)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    # the first key is kept, so that no row is masked as a whole
    seen = ((keep > 0) | (columns == 0))[:, None, None, :] & (columns <= rows[:, None])
    mask = torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min).to(scores.dtype)
    return F.softmax((scores + (bias + mask)).to(torch.float32), -1).to(scores.dtype)


@group(
    "quantize",
    TOKENS,
    lambda m, n: [plain((m, n))],
    forward=("row", lambda m, n: 3 * m * n + 4 * m),  # x; int8, a float32 scale per row
)
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token."""
    wider = x.to(torch.float32)
    scale = wider.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return (wider / scale).round().clamp(-128, 127).to(torch.int8), scale


@group(
    "dequantize",
    {**TOKENS, (32768, 4096): (7, 40), (4096, 11008): (4, 43)},
    lambda m, n: [plain((m, n), torch.int8, high=127), wide((m, 1), grad=False)],
    forward=("pointwise", lambda m, n: 3 * m * n + 4 * m),
)
def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    return (q.to(torch.float32) * scale).to(torch.bfloat16)


@group(
    "argmax",
    {(64, 128256): (4, 130)},
    lambda m, n: [plain((m, n))],
    forward=("other", lambda m, n: 2 * m * n + 8 * m),  # logits; int64
)
def argmax(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@group(
    "cumsum",
    {(8192, 8192): (5, 40)},
    lambda m, n: [wide((m, n), grad=False)],
    forward=("row", lambda m, n: 8 * m * n),  # float32
)
def cumsum(x: Tensor) -> Tensor:
    return x.cumsum(-1)


LONG = {(1 << 27,): (3000,)}


@group("sum", LONG, lambda n: [plain((n,), high=7)], forward=("row", lambda n: 2 * n))
def full_sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float32)


@group("mean_square", LONG, lambda n: [plain((n,))], forward=("row", lambda n: 2 * n))
def mean_square(x: Tensor) -> Tensor:
    return x.to(torch.float32).pow(2).mean()


# ---------------------------------------------------------------------------- pointwise

FLAT = {(1 << 26,): (1000,)}
HIDDEN = {(8192, 14336): (5, 48)}
UNARY: dict[str, Aim] = {
    "forward": ("pointwise", lambda n: 4 * n),  # x; y
    "backward": ("pointwise", lambda n: 6 * n),  # x, dy; dx
}
GATED: dict[str, Aim] = {
    "forward": ("pointwise", lambda m, n: 6 * m * n),  # gate, up; y
    "backward": ("pointwise", lambda m, n: 10 * m * n),  # gate, up, dy; dgate, dup
}
DROPPED: dict[str, Aim] = {
    "forward": ("pointwise", lambda n: 4 * n),  # a seed stands for the mask
    "backward": ("pointwise", lambda n: 4 * n),  # dy; dx
}


@group("gelu_erf", FLAT, lambda n: [T((n,))], **UNARY)
def gelu_erf(x: Tensor) -> Tensor:
    return F.gelu(x)


@group("gelu_tanh", FLAT, lambda n: [T((n,))], **UNARY)
def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@group("swiglu", HIDDEN, lambda m, n: [T((m, n)), T((m, n))], **GATED)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@group("geglu", HIDDEN, lambda m, n: [T((m, n)), T((m, n))], **GATED)
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


@group(
    "cat",
    HIDDEN,
    lambda m, n: [plain((m, n)), plain((m, n)), plain((m, n)), plain((2 * n,))],
    forward=("pointwise", lambda m, n: 10 * m * n + 4 * n),  # a, b, c; both halves
)
def cat(a: Tensor, b: Tensor, c: Tensor, scale: Tensor) -> Tensor:
    """Two chains side by side, scaled."""
    return torch.cat((F.silu(a), b * torch.sigmoid(c)), -1) * scale


@group("dropout", FLAT, lambda n: [T((n,))], dropout=True, **DROPPED)
def dropout(x: Tensor, p: float = 0.1) -> Tensor:
    return F.dropout(x, p)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


@group(
    "rope",
    {(8192, 32, 8, 128): (6, 4, 2, 16)},
    # what the projections leave, and the angles
    lambda s, q, k, d: [plain((1, s, h, d)) for h in (q, k)] + [plain((1, s, d))] * 2,
    forward=("pointwise", lambda s, q, k, d: 4 * s * (q + k) * d + 4 * s * d),
)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of transposed queries and keys."""
    q, k, cos, sin = q.transpose(1, 2), k.transpose(1, 2), cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


@group(
    "kv_cache",
    {(4, 2048, 4096, 8, 128): (2, 3, 8, 2, 16), (64, 1, 4096, 8, 128): (2, 1, 8, 2, 16)},
    lambda b, s, length, h, d: [
        *[plain((b, s, h, d))] * 2,
        *[plain((1, s, d))] * 2,
        *[plain((b, h, length, d), written=True)] * 2,
    ],
    # k, v, the angles; the new positions of both caches, whose others stay
    forward=("other", lambda b, s, length, h, d: 8 * b * s * h * d + 4 * s * d),
)
def kv_cache(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> None:
    """Rotated keys, and values, into a static cache, from its second position on."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    where = torch.arange(1, 1 + k.shape[2], device=k.device)
    keys.index_copy_(2, where, k * cos[:, None] + rotate_half(k) * sin[:, None])
    values.index_copy_(2, where, v)
