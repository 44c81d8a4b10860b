"""The calls of multi-tensor ops that are timed: lists of parameters, as an optimizer has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.op_cases import Case, Sizes, by_size
from gems_compile import eager
from gems_compile.calls.lists import foreach
from gems_compile.kernels.op import T, call

#: layers of a matrix and a vector each
LAYERS = 12


def lists(name: str, sizes: Sizes) -> Iterator[Case]:
    """A call on parameters of ``LAYERS`` layers; none of what is no multi-tensor op."""
    if name not in foreach():
        return
    overload = eager._declared()[name]
    rows, columns = sizes.matrices[1]

    def one(kind: str) -> Any:
        if kind == "List[Tensor]":  # between 0 and 1, where every op is defined
            drawn = [T(rows, columns, low=0.1, high=0.9), T(columns, low=0.1, high=0.9)]
            return drawn * LAYERS
        return T(low=0.1, high=0.9) if kind == "Tensor" else 1.25

    given = [one(str(a.type)) for a in overload._schema.arguments if not a.has_default_value()]
    size = by_size(2 * LAYERS, rows, columns)
    yield Case(name, "list", size, call(*given))
