"""The calls of attention that are timed: see ``op_cases``; ``benchmarks.attention`` sets backends
side by side. What a backward is given of its forward, ATen's forward makes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.op_cases import SEED, Case, Given, Sizes
from gems_compile.kernels.op import Call, call

#: by the backend: what stands between query, key, value and whether it is causal
FORWARD = {"flash": (0.0,), "cudnn": (None, True, 0.0), "efficient": (None, True, 0.0)}
#: (batch, heads, length, width)
SHAPES = ((4, 16, 4096, 128), (4, 16, 4096, 64), (16, 12, 1024, 64))


def attention(name: str, sizes: Sizes) -> Iterator[Case]:
    """None on a CPU, whose shapes are small: the overloads are a GPU's."""
    backward = "_attention_backward." in name
    backend = next((b for b in FORWARD if f"_product_{b}_attention{'_b' * backward}" in name), None)
    if backend is None or "_for_cpu" in name or sizes.square < 64:
        return
    for shape in SHAPES:
        for causal in (False, True):
            made = (_backward if backward else _forward)(backend, shape, causal)
            label = "x".join(map(str, shape)) + "-causal" * causal
            yield Case(name, "product", label, made, whole=False, compared=3 if backward else 1)


def _forward(backend: str, shape: tuple[int, ...], causal: bool) -> Call:
    return call(*_operands(shape)[:3], *FORWARD[backend], causal)


def _operands(shape: tuple[int, ...]) -> list[Given]:
    """Query, key, value and the gradient, as a linear layer leaves them."""
    return [Given(shape, functools.partial(_drawn, shape, k)) for k in range(4)]


def _drawn(shape: tuple[int, ...], place: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    batch, heads, length, width = shape
    generator = torch.Generator(device).manual_seed(SEED + place)
    lying = (batch, length, heads, width)
    drawn = torch.randn(lying, device=device, dtype=dtype, generator=generator)
    return drawn.transpose(1, 2)


def _backward(backend: str, shape: tuple[int, ...], causal: bool) -> Call:
    *qkv, do = _operands(shape)
    length = shape[2]

    def of(place: int) -> Given:
        """A result of the forward."""
        return Given(shape, functools.partial(_made, backend, shape, causal, place))

    out, lse = of(0), of(1)
    if backend == "efficient":
        wanted = [True, True, True, False]
        return call(do, *qkv, None, out, lse, of(2), of(3), 0.0, wanted, causal)
    lengths = None, None, length, length
    if backend == "cudnn":
        return call(do, *qkv, out, lse, of(6), of(7), None, *lengths, 0.0, causal)
    return call(do, *qkv, out, lse, *lengths, 0.0, causal, of(6), of(7))


def _made(
    backend: str,
    shape: tuple[int, ...],
    causal: bool,
    place: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    overload = getattr(torch.ops.aten, f"_scaled_dot_product_{backend}_attention").default
    given = [x.make(dtype, device) for x in _operands(shape)[:3]]
    return overload(*given, *FORWARD[backend], causal)[place]
