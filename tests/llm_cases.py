"""Calls of ``gems_compile.llm`` beside what they stand for, written with torch's own functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from helpers import ints, rand
from torch import Tensor

from gems_compile import llm


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def llama_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    h = wide(x)
    n = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return n if weight is None else weight * n


def gemma_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = wide(x)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return llama_norm(h, *weight), h


def add_layer_norm(x: Tensor, residual: Tensor, *affine: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.layer_norm(h, h.shape[-1:], *affine, eps=1e-5), h


def silu_and_mul(x: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = x.chunk(2, -1) if up is None else (x, up)
    return F.silu(gate) * up


def gelu_and_mul(x: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    gate, up = x.chunk(2, -1) if up is None else (x, up)
    return F.gelu(gate, approximate=approximate) * up


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, heads_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As ``transformers`` writes it for Llama and for GPT-J."""
    if cos.dim() == 2:
        cos, sin = (
            (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1))[None]
            for t in (cos, sin)
        )
    cos, sin = cos.unsqueeze(heads_dim), sin.unsqueeze(heads_dim)
    size = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return torch.cat((-x[..., size // 2 :], x[..., : size // 2]), -1)

    def turned(x: Tensor) -> Tensor:
        part = x[..., :size]
        return torch.cat((part * cos + rotate(part) * sin, x[..., size:]), -1)

    return turned(q), turned(k)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    **more: Any,
) -> Tensor:
    z = wide(logits)
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    rows, goals = z.reshape(-1, z.shape[-1]), target.reshape(-1).long()
    loss = F.cross_entropy(rows, goals, reduction=reduction, **more)
    return loss.reshape(target.shape) if reduction == "none" else loss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None,
    chunk: int | None = None, **more: Any,
) -> Tensor:  # fmt: skip
    return cross_entropy(F.linear(hidden, weight, bias), target, **more)


def topk_softmax(logits: Tensor, k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    weights, indices = torch.softmax(wide(logits), -1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, indices


@dataclass(frozen=True)
class Case:
    """``fn`` and ``reference`` of the tensors that ``make`` draws in a dtype; ``calls``: how many
    launches and calls of ATen's a compiled forward and its backward are."""

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[torch.dtype], Sequence[Tensor]]
    calls: tuple[int, int]


def _case(
    name: str,
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    make: Callable[[torch.dtype], Sequence[Tensor]],
    calls: tuple[int, int],
    **fixed: Any,
) -> Case:
    partial = functools.partial
    return Case(name, partial(fn, **fixed), partial(reference, **fixed), make, calls)


def draw(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], list[Tensor]]:
    return lambda dtype: [rand(*shape, dtype=dtype, grad=True) for shape in shapes]


def transposed(dtype: torch.dtype) -> list[Tensor]:
    """[3, 5, 33] with another order in memory, and a slice that begins at an odd address."""
    x = rand(5, 3, 33, dtype=dtype).transpose(0, 1)
    up = rand(3, 5, 35, dtype=dtype)[..., 1:34]
    return [x.requires_grad_(), up.requires_grad_()]


def turned(rows: int | None, size: int) -> Callable[[torch.dtype], list[Tensor]]:
    """q [2, 4, 7, 12], as attention gets it, k with two heads, and tables of either form."""

    def make(dtype: torch.dtype) -> list[Tensor]:
        q = rand(2, 7, 4, 12, dtype=dtype).transpose(1, 2).requires_grad_()
        shape = (7, size) if rows is None else (rows, 7, size)
        return [
            q,
            rand(2, 2, 7, 12, dtype=dtype, grad=True),
            *(rand(*shape, dtype=dtype) for _ in "cs"),
        ]

    return make


def scored(
    *shape: int, high: int, kind: torch.dtype = torch.int64, ignored: int = -100
) -> Callable[[torch.dtype], list[Tensor]]:
    """Logits and targets, the first of them ignored."""

    def make(dtype: torch.dtype) -> list[Tensor]:
        target = ints(*shape, high=high, dtype=kind)
        target.view(-1)[0] = ignored
        return [(rand(*shape, high, dtype=dtype) * 2).detach().requires_grad_(), target]

    return make


def shifted(dtype: torch.dtype) -> list[Tensor]:
    """A causal model's logits and labels, whose slice begins 8 bytes after a multiple of 16."""
    logits = (rand(2, 6, 40, dtype=dtype) * 2)[:, :-1].detach().requires_grad_()
    return [logits, ints(2, 6, high=40)[:, 1:]]


def projected(bias: bool) -> Callable[[torch.dtype], list[Tensor]]:
    def make(dtype: torch.dtype) -> list[Tensor]:
        target = ints(2, 5, high=37)
        target[0, 1] = -100
        hidden, weight = (
            rand(2, 5, 24, dtype=dtype, grad=True),
            rand(37, 24, dtype=dtype, grad=True),
        )
        return [hidden, weight, target, *([rand(37, dtype=dtype, grad=True)] if bias else [])]

    return make


_X, _N = (3, 5, 33), (33,)

CASES = [
    _case("rms_norm", llm.rms_norm, llama_norm, draw(_X, _N), (1, 2)),
    _case("rms_norm_plain", llm.rms_norm, llama_norm, draw(_X), (1, 1)),
    _case(
        "rms_norm_gemma",
        functools.partial(llm.rms_norm, weight_after_cast=False),
        gemma_norm,
        draw(_X, _N),
        (1, 2),
    ),
    _case("fused_add_rms_norm", llm.fused_add_rms_norm, add_rms_norm, draw(_X, _X, _N), (1, 2)),
    _case("fused_add_rms_norm_plain", llm.fused_add_rms_norm, add_rms_norm, draw(_X, _X), (1, 1)),
    _case("add_layer_norm", llm.add_layer_norm, add_layer_norm, draw(_X, _X, _N, _N), (1, 2)),
    _case("add_layer_norm_plain", llm.add_layer_norm, add_layer_norm, draw(_X, _X), (1, 1)),
    _case("silu_and_mul", llm.silu_and_mul, silu_and_mul, draw((3, 5, 34)), (1, 1)),
    _case("silu_and_mul_two", llm.silu_and_mul, silu_and_mul, transposed, (1, 1)),
    _case("gelu_and_mul", llm.gelu_and_mul, gelu_and_mul, draw(_X, _X), (1, 1)),
    _case(
        "gelu_and_mul_tanh",
        llm.gelu_and_mul,
        gelu_and_mul,
        draw((2, 34)),
        (1, 1),
        approximate="tanh",
    ),
    _case("rotary", llm.apply_rotary, rotary, turned(None, 6), (1, 1)),
    _case("rotary_of_a_part", llm.apply_rotary, rotary, turned(2, 8), (1, 1)),
    _case("rotary_one_table", llm.apply_rotary, rotary, turned(1, 12), (1, 1)),
    _case("rotary_pairs", llm.apply_rotary, rotary, turned(2, 12), (1, 1), interleaved=True),
    _case(
        "rotary_pairs_of_a_part",
        llm.apply_rotary,
        rotary,
        turned(None, 4),
        (1, 1),
        interleaved=True,
    ),
    _case("cross_entropy", llm.cross_entropy, cross_entropy, scored(9, high=133), (2, 1)),
    _case("cross_entropy_shifted", llm.cross_entropy, cross_entropy, shifted, (2, 1)),
    _case(
        "cross_entropy_none",
        llm.cross_entropy,
        cross_entropy,
        scored(2, 5, high=40, kind=torch.int32),
        (1, 1),
        reduction="none",
        softcap=3.0,
    ),
    _case(
        "cross_entropy_sum",
        llm.cross_entropy,
        cross_entropy,
        scored(9, high=133, ignored=4),
        (2, 1),
        reduction="sum",
        label_smoothing=0.1,
        ignore_index=4,
    ),
    _case(
        "linear_cross_entropy",
        llm.linear_cross_entropy,
        linear_cross_entropy,
        projected(False),
        (1, 1),
        chunk=4,
    ),
    _case(
        "linear_cross_entropy_bias",
        llm.linear_cross_entropy,
        linear_cross_entropy,
        projected(True),
        (1, 2),
        softcap=5.0,
        label_smoothing=0.1,
        reduction="sum",
    ),
    _case("topk_softmax", llm.topk_softmax, topk_softmax, draw((9, 16)), (2, 1), k=3),
    _case(
        "topk_softmax_of_all",
        llm.topk_softmax,
        topk_softmax,
        draw((2, 5, 7)),
        (2, 1),
        k=2,
        renormalize=False,
    ),
]
