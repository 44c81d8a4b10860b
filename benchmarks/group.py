"""How a fused group is declared: a function, its inputs, its least bytes, how it is timed.

A group is declared once, above its plain PyTorch function, and is timed in one of four ways:
  forward   the function, without gradients
  backward  its gradients alone, of all inputs that ask for one
  train     forward and backward
  update    the function returns an optimizer, and its step is timed
``least`` counts the bytes that must cross device memory once, whoever computes it: inputs read,
results written, in bytes of the sizes; what backward saves is its own affair. 16-bit values unless
said: 2 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

SEED = 1234
STEPS = ("forward", "backward", "train", "update")
TARGETS = ("pointwise", "row", "norm_backward", "loss", "other")
Sizes = tuple[int, ...]
Aim = tuple[str, Callable[..., int]]  # target class, least bytes of the sizes


@dataclass(frozen=True)
class T:
    """One input: normal numbers, or integers below ``high``.

    ``grad``: the backward step asks for its gradient; ``written``: the function changes it.
    """

    shape: Sizes
    dtype: torch.dtype = torch.bfloat16
    grad: bool = True
    high: int | None = None
    written: bool = False
    positive: bool = False  # at least 0.5: a variance
    channels_last: bool = False

    def fixed(self) -> T:
        """The same of inference: no gradient, nothing written."""
        return replace(self, grad=False, written=False)

    def make(self, device: torch.device) -> Tensor:
        if self.high is not None:
            return torch.randint(0, self.high, self.shape, device=device).to(self.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        drawn = torch.randn(self.shape, device=device)
        drawn = drawn.abs_().add_(0.5) if self.positive else drawn
        return drawn.to(self.dtype, memory_format=layout).requires_grad_(self.grad)


@dataclass(frozen=True)
class Group:
    """One function at one size, timed in one way."""

    name: str
    fn: Callable[..., Any]
    step: str
    target: str
    least: Callable[..., int]
    inputs: Callable[..., Any]
    sizes: Sizes
    small: Sizes
    dropout: bool = False  # fn takes p; its error is that of p = 0

    def least_bytes(self, small: bool = False) -> int:
        """The fewest bytes that a call moves."""
        return self.least(*(self.small if small else self.sizes))

    def declared(self, small: bool = False) -> Any:
        """The inputs as T, lists of them where the function takes lists."""
        return list(self.inputs(*(self.small if small else self.sizes)))

    def make(self, device: torch.device, small: bool = False) -> list[Any]:
        """The function's arguments, the same numbers every time."""
        torch.manual_seed(SEED)
        return tree_map(lambda t: t.make(device), self.declared(small))


GROUPS: dict[str, Group] = {}


def spell(size: int) -> str:
    """A size in a name: 4096, but 2^26."""
    large = size >= 1 << 20 and size.bit_count() == 1
    return f"2^{size.bit_length() - 1}" if large else str(size)


def group(
    family: str,
    sizes: Mapping[Any, Sizes],
    inputs: Callable[..., Iterable[Any]],
    dropout: bool = False,
    **aims: Aim,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function's groups: each size (and the small one for a CPU), timed each way."""

    def declare(fn: Callable[..., Any]) -> Callable[..., Any]:
        for full, small in sizes.items():
            for step, (target, least) in aims.items():
                name = f"{family}-{'x'.join(map(spell, full))}"
                name += "" if step in ("forward", "update") else f"-{step}"
                assert name not in GROUPS and step in STEPS and target in TARGETS, name
                one = Group(name, fn, step, target, least, inputs, full, small, dropout)
                GROUPS[name] = one
        return fn

    return declare
