"""What the symbols of a graph's sizes are in a call, as texts of the function that makes it, and
what they were when it was traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .graph import value_of
from .indexing import Size, is_static, size_of


class Symbols:
    """Each symbol, or expression that an input shows as such, as the function has it."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def note(self, size: Any, text: str) -> None:
        """``text`` is a SymInt."""
        self.known.setdefault(str(size_of(size)), text)

    def text(self, size: Size) -> str:
        """A size as Python: a literal, an input, or an expression of symbols."""
        if isinstance(size, int):
            return str(int(size))
        text = str(size)
        if text in self.known:
            return self.known[text]
        from sympy import Symbol
        from torch.utils._sympy.printers import PythonPrinter

        missing = [str(s) for s in size.free_symbols if str(s) not in self.known]
        if missing:
            raise KeyError(f"no input tells the value of {missing[0]}")
        named = {s: Symbol(self.known[str(s)], integer=True) for s in size.free_symbols}
        return f"({PythonPrinter().doprint(size.xreplace(named))})"

    def learn(self, tensor: torch.Tensor, name: str) -> Iterator[str]:
        """Lines that take from the tensor ``name`` what is not known yet: its sizes, and symbols of
        which sizes or strides are multiples."""
        if is_static(*tensor.shape, *tensor.stride()):
            return
        for k, size in enumerate(tensor.shape):
            yield from self._learn(size, f"{name}.shape[{k}]", whole=True)
        for k, stride in enumerate(tensor.stride()):
            yield from self._learn(stride, f"{name}.stride({k})", whole=False)

    def _learn(self, length: Any, where: str, whole: bool) -> Iterator[str]:
        """``whole``: an expression is known as such, too."""
        expr = size_of(length)
        if is_static(expr):
            return
        by, symbol = expr.as_coeff_Mul()
        found = [(expr, where)] if whole or expr.is_Symbol else []
        found += [(symbol, f"{where} // {by}")] if symbol.is_Symbol and by != 1 else []
        for known, text in found:
            if str(known) not in self.known:
                learnt = self.known[str(known)] = f"n{len(self.known)}"
                yield f"{learnt} = {text}"


def hints_of(graph: torch.fx.Graph) -> dict[Any, int]:
    """What the symbols of a graph's inputs were when it was traced."""
    found: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        val = value_of(node)
        sizes = (*val.shape, *val.stride()) if isinstance(val, torch.Tensor) else (val,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.has_hint():
                expr = size_of(size)
                if is_static(expr):
                    continue
                by, symbol = expr.as_coeff_Mul()
                if symbol.is_Symbol:
                    found[symbol] = int(size.node.hint) // int(by)
    return found


def number_of(size: Size, known: Mapping[Any, int]) -> int | None:
    """A size where its symbols are what is ``known``; None if that does not say."""
    found = size if is_static(size) else size.xreplace(known)
    return int(found) if is_static(found) or found.is_number else None
