"""ATen overloads that make a tensor of numbers and places alone, which eager mode serves as well.

Under ``torch.compile`` their readers compute what they need of such a tensor; in eager mode nobody
reads it in the same graph, so it is stored. Like ``composed.COMPOSED`` they are taken apart by
torch's rules, and by those here where torch has none. torch is imported inside the functions:
compile workers import these files without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

FACTORIES: tuple[str, ...] = (
    "aten.arange.default",
    "aten.arange.start",
    "aten.arange.start_step",
    "aten.eye.default",
    "aten.eye.m",
    "aten.full.default",
    "aten.full_like.default",
    "aten.linspace.default",
    "aten.logspace.default",
    "aten.new_full.default",
    "aten.new_ones.default",
    "aten.new_zeros.default",
    "aten.ones.default",
    "aten.ones_like.default",
    "aten.range.default",
    "aten.range.step",
    "aten.scalar_tensor.default",
    "aten.zero.default",
    "aten.zeros.default",
    "aten.zeros_like.default",
)

#: what says which tensor a factory makes, beside its sizes and numbers
OPTIONS = ("dtype", "layout", "device", "pin_memory")


def arange(start: Any, end: Any, step: Any = 1, *, dtype: Any = None, **options: Any) -> Any:
    """start + step * [0, 1, ..., ceil((end - start) / step)), where the result or a number is
    floating: computed in float64 and rounded once."""
    import torch

    numbers = (start, end, step)
    if dtype is None:
        floating = any(isinstance(n, float) for n in numbers)
        dtype = torch.get_default_dtype() if floating else torch.int64
    if all(isinstance(n, (int, torch.SymInt)) for n in numbers) and not dtype.is_floating_point:
        return NotImplemented
    return _steps(start, step, math.ceil((end - start) / step), dtype, options)


def range_(start: Any, end: Any, step: Any = 1, *, dtype: Any = None, **options: Any) -> Any:
    """start + step * [0, 1, ..., floor((end - start) / step)]: the end counts."""
    import torch

    dtype = torch.get_default_dtype() if dtype is None else dtype
    return _steps(start, step, math.floor((end - start) / step) + 1, dtype, options)


def linspace(*numbers: Any, dtype: Any = None, **options: Any) -> Any:
    """torch's rule, but of integers, which ATen's kernels round otherwise."""
    import torch

    return torch._refs.linspace(*numbers, dtype=_floating(dtype), **options)


def logspace(*numbers: Any, dtype: Any = None, **options: Any) -> Any:
    """As ``linspace``."""
    import torch

    return torch._refs.logspace(*numbers, dtype=_floating(dtype), **options)


def _floating(dtype: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"a line of {dtype}")
    return dtype


def eye(n: int, m: int | None = None, *, dtype: Any = None, **options: Any) -> Any:
    """1 where the row is the column, else 0: n x m, or n x n."""
    import torch

    dtype = torch.get_default_dtype() if dtype is None else dtype
    rows, columns = (
        torch.arange(count, dtype=torch.int64, device=options.get("device"))
        for count in (n, n if m is None else m)
    )
    return (rows.unsqueeze(-1) == columns).to(dtype)


def _steps(start: Any, step: Any, count: int, dtype: Any, options: dict[str, Any]) -> Any:
    import torch

    if count < 0 or not dtype.is_floating_point:
        raise ValueError(f"{count} numbers of {dtype}")
    places = torch.arange(count, dtype=torch.int64, device=options.get("device"))
    return (places.to(torch.float64) * step + start).to(dtype)


#: rules beside torch's own
RULES: dict[str, Callable[..., Any]] = {
    "aten.arange.default": lambda end, **options: arange(0, end, **options),
    "aten.arange.start": arange,
    "aten.arange.start_step": arange,
    "aten.eye.default": eye,
    "aten.eye.m": eye,
    "aten.linspace.default": linspace,
    "aten.logspace.default": logspace,
    "aten.range.default": range_,
    "aten.range.step": range_,
}
