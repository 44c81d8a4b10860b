"""The ops of ``gems_compile.llm`` as modules, in place of torch's and transformers'.

Parameters are named as there, so that a ``state_dict`` loads either way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import llm
from .errors import ArgumentError

__all__ = [
    "CrossEntropyLoss",
    "GeluAndMul",
    "LayerNorm",
    "LinearCrossEntropy",
    "RMSNorm",
    "RotaryEmbedding",
    "SiluAndMul",
]


class RMSNorm(nn.Module):
    """``llm.rms_norm``; with a residual, ``llm.fused_add_rms_norm``: (y, x + residual).

    In place of ``LlamaRMSNorm``; with ``weight_after_cast=False`` of ``torch.nn.RMSNorm``, whose
    eps by default is that of its input's dtype, and has to be given here.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, weight_after_cast: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps
        self.weight_after_cast = weight_after_cast

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        more = self.weight, self.variance_epsilon, self.weight_after_cast
        if residual is None:
            return llm.rms_norm(x, *more)
        return llm.fused_add_rms_norm(x, residual, *more)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``; with a residual, ``llm.add_layer_norm``: (y, x + residual)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return super().forward(x)
        if len(self.normalized_shape) != 1:
            raise ArgumentError(
                f"LayerNorm over {tuple(self.normalized_shape)} takes no residual; over one dim it "
                "does"
            )
        return llm.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RotaryEmbedding(nn.Module):
    """``llm.apply_rotary`` by position: pair i of position p turns by p * base ** (-2 i / dim).

    dim:           R, how many of a head's features turn
    max_positions: how many positions the tables hold; they are no part of the ``state_dict``
    forward(q, k, positions=None): q and k as ``apply_rotary`` takes them. positions: [S] or [B, S]
    of integers; None is 0, 1, ... S - 1. cos and sin are rounded to q's dtype, as in transformers.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 4096,
        base: float = 10000.0,
        interleaved: bool = False,
        heads_dim: int = 1,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ArgumentError(f"dim is {dim}; valid: an even number of features")
        self.max_positions, self.interleaved, self.heads_dim = max_positions, interleaved, heads_dim
        frequencies = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / -dim)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        length = q.shape[3 - self.heads_dim]
        if positions is None and length > self.max_positions:
            raise ArgumentError(
                f"q has {length} positions; there are tables for max_positions={self.max_positions}"
            )
        cos, sin = (self._rows(t, length, positions).to(q.dtype) for t in (self.cos, self.sin))
        return llm.apply_rotary(q, k, cos, sin, self.interleaved, self.heads_dim)

    def _rows(self, table: Tensor, length: int, positions: Tensor | None) -> Tensor:
        if positions is None:
            return table[:length]
        rows = table[positions]
        if positions.dim() == 1:
            return rows
        if self.interleaved:
            return rows.repeat_interleave(2, -1)
        return torch.cat((rows, rows), -1)


class SiluAndMul(nn.Module):
    """``llm.silu_and_mul``, of one tensor or two."""

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        return llm.silu_and_mul(x, up)


class GeluAndMul(nn.Module):
    """``llm.gelu_and_mul``, of one tensor or two; approximate: "none" or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        return llm.gelu_and_mul(x, up, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class CrossEntropyLoss(nn.Module):
    """``llm.cross_entropy``: ``torch.nn.CrossEntropyLoss`` of class indices, classes last."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.softcap = label_smoothing, softcap

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        more = self.ignore_index, self.label_smoothing, self.reduction, self.softcap
        return llm.cross_entropy(logits, target, *more)


class LinearCrossEntropy(nn.Linear):
    """``llm.linear_cross_entropy``: ``torch.nn.Linear`` to the classes, and the logits' loss.

    forward(hidden, target) returns the loss; the parameters are ``weight`` and ``bias``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, bias)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.softcap, self.chunk = label_smoothing, softcap, chunk

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        more = self.ignore_index, self.label_smoothing, self.reduction, self.softcap, self.chunk
        return llm.linear_cross_entropy(hidden, self.weight, target, self.bias, *more)
