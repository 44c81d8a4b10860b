"""References (``references.py``) as Python text, as ``runnable`` writes graphs; and text as the
functions that it defines, in the graph's own dtypes and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map_only

from ..lowering.graph import value_of
from ..lowering.indexing import Size, size_of
from ..lowering.ir import SizeArg
from ..lowering.translate import Program
from .compare import now
from .references import Reference, filled_with, is_number
from .runnable import Writer, imports, spelled
from .typed import SHORT


class Sizes:
    """Sizes as numbers. ``known``: what each symbol is."""

    def __init__(self, known: Mapping[Any, int]) -> None:
        self.known = dict(known)

    def __call__(self, size: Size) -> int:
        if isinstance(size, int):
            return size
        return int(size.xreplace(self.known))

    def all(self, sizes: Iterable[Size]) -> tuple[int, ...]:
        return tuple(map(self, sizes))

    @classmethod
    def of_call(cls, graph: torch.fx.Graph, args: Iterable[Any]) -> Sizes:
        """Of the tensors and numbers that a graph is called with."""
        known: dict[Any, int] = {}
        for node, arg in zip(graph.find_nodes(op="placeholder"), args, strict=True):
            val = value_of(node)
            if isinstance(val, torch.Tensor) and isinstance(arg, torch.Tensor):
                symbolic, found = (*val.shape, *val.stride()), (*arg.shape, *arg.stride())
            else:
                symbolic, found = (val,), (arg,)
            for size, number in zip(symbolic, found, strict=False):
                expr = size_of(size) if isinstance(size, torch.SymInt) else 0
                if not isinstance(expr, int) and expr.is_Symbol:
                    known.setdefault(expr, int(number))
        return cls(known)


class References(Writer):
    """Writes the references of one graph, its sizes as ``sizes`` says."""

    def __init__(self, gm: GraphModule, program: Program, sizes: Sizes) -> None:
        super().__init__(gm)
        self.program, self.sizes = program, sizes

    def example(self, size: Any) -> Any:
        if isinstance(size, torch.SymInt):
            return self.sizes(size_of(size))
        return super().example(size)

    def reference(self, reference: Reference) -> str:
        """``def reference_3(x, ...)`` returns what the launch should leave in memory."""
        holder = {value: node for node, value in reversed(reference.reads.items())}
        # what a node stores into part of a tensor is looked for in all of it
        results = [spelled(holder.get(r.value, r.node)) for r in reference.results]
        text = self.define(reference.function, reference.reads, reference.nodes, self.gm)
        return f"{text}\n    return ({', '.join(results)},)"

    def call_of(self, name: str, node: Node) -> str:
        """One node as a function of its operands."""
        text = self.define(name, node.all_input_nodes, [node], self.gm)
        return f"{text}\n    return {spelled(node)}"

    def line(self, node: Node, gm: GraphModule) -> str:
        entry = self.program.of.get(node)
        if node.op != "output" and is_number(entry, node):
            number = self.sizes(entry.expr) if isinstance(entry, SizeArg) else entry
            known = isinstance(number, int)
            return f"{spelled(node)} = {number if known else self.literal(value_of(node))}"
        number = filled_with(entry)
        if number is not None and node.op == "call_function":
            number = self.sizes(number.expr) if isinstance(number, SizeArg) else number
            val = value_of(node)
            shape = self.value(tuple(self.example(n) for n in val.shape))
            made = f"torch.full({shape}, {self.literal(number)}, dtype={val.dtype}"
            return f"{spelled(node)} = {made}, device={self.device(val.device)})"
        return super().line(node, gm)

    def head(self) -> str:
        return imports(self)


def shown(reference: Reference, text: str) -> str:
    """A reference as comments, for the kernel's file; or why there is none."""
    lines = ["# What eager PyTorch computes in its place:"]
    lines += [f"#   {line}".rstrip() for line in text.splitlines()]
    if reference.why_not:
        lines = [f"# Not checkable by itself: {reference.why_unchecked}."]
    for value, why in reference.unnamed.items() if not reference.why_not else ():
        lines.append(f"# Beside that it stores {describe_value(value)}: {why}.")
    return "\n".join(lines) + "\n"


def describe_value(value: Any) -> str:
    """A Value as ``describe`` shows tensors."""
    return f"{SHORT.get(value.dtype, value.dtype)}[{', '.join(map(str, value.shape))}]"


# text as functions --------------------------------------------------------------------------------


class _WideTorch:
    """torch, as a program sees it whose floating-point numbers are all of 64 bits."""

    ops: Any

    def __init__(self) -> None:
        self.ops = _WideOps(torch.ops)

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if isinstance(found, torch.dtype):
            return torch.float64 if found.is_floating_point else found
        return found


class _WideOps:
    """``torch.ops``, a namespace of it, or a packet of overloads."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.found, name)
        if isinstance(found, torch._ops.OpOverload):
            return partial(_called_wide, found)
        return _WideOps(found)


def _called_wide(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Softmax of float64 takes no half_to_float. New results are moved, if that is asked for."""
    if op in (torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default):
        args = (*args[:2], False)
    result = op(*args, **kwargs)
    if now.move is None or any(r.alias_info is not None for r in op._schema.returns):
        return result
    return tree_map_only(torch.Tensor, now.move, result)


def functions(text: str, wide: bool = False) -> dict[str, Callable[..., Any]]:
    """What a text defines; if ``wide``, with float64 in place of other floating-point dtypes."""
    scope: dict[str, Any] = {}
    exec(compile(text, "<gems references>", "exec"), scope)
    if wide:
        scope["torch"] = _WideTorch()
    return scope


__all__ = ["References", "Sizes", "functions", "shown"]
