"""A graph as a Python file that runs by itself: ``python 00_aten.py`` makes inputs and calls it.

Each line is one node, with what it holds; above it the user's line it came from. Inputs are random,
with the shapes, strides and dtypes of the real ones, symbolic sizes at the values they had when the
graph was traced. What no file can hold (a user's Triton kernel, an op of the user's own library) is
named in the file, which then says so instead of running.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

from ..lowering.graph import module_path, source_line
from .typed import describe

RESERVED = {"torch", "math", "operator", "tensor", "make_inputs", "forward", "describe"}
OWN_LIBRARIES = {"aten", "prims", "prim", "higher_order", "_c10d_functional", "c10d"}
#: higher-order ops that take plain functions when they are called eagerly
CALLABLE_BODIES = {"cond", "while_loop"}
SMALL = 64  # elements of a constant that is written out
UNBACKED = 8  # stands for a size that depends on data

TENSOR = '''
def tensor(shape, stride, dtype, device, offset=0):
    """Random values; whole numbers are 0 or 1, so that they are in range as indices."""
    length = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if 0 not in shape else 0
    if dtype.is_floating_point or dtype.is_complex:
        kind = torch.complex64 if dtype.is_complex else torch.float32
        values = torch.randn(length, dtype=kind)
    else:
        values = torch.randint(0, 2, (length,))
    return values.to(device, dtype).as_strided(shape, stride, offset if length else 0)
'''

MAIN = """
def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        results = forward(*make_inputs())
    for place, result in enumerate(results):
        print(f"result {place}: {describe(result)}")
"""

CANNOT = """
if __name__ == "__main__":
    raise SystemExit("this graph does not run outside its program: " + CANNOT_RUN)
"""


def to_python(gm: GraphModule, title: str = "A graph.") -> str:
    """The whole file."""
    writer = Writer(gm)
    forward = writer.function("forward", gm)
    inputs = writer.make_inputs()
    cannot = "; ".join(dict.fromkeys(writer.cannot))
    head = f'"""{title}\n\n{_notes(writer, cannot)}"""\n\n{imports(writer)}'
    if cannot:
        head += f"\n\nCANNOT_RUN = {cannot!r}"
    last = CANNOT if cannot else MAIN
    blocks = [head, TENSOR.strip(), *writer.bodies, forward, inputs, last.strip()]
    return "\n\n\n".join(blocks) + "\n"


def _notes(writer: Writer, cannot: str) -> str:
    notes = [
        f"{name} is {size} here; the program may call it with other sizes."
        for name, size in writer.symbols.items()
    ]
    notes += [f"{note}." for note in dict.fromkeys(writer.notes)]
    runs = "Run it: the inputs are random, with the shapes, strides and dtypes of the real ones."
    notes.append(f"It does not run by itself: {cannot}." if cannot else runs)
    return "\n".join(notes) + "\n"


def imports(writer: Writer) -> str:
    """The first lines of a file: what it imports, and its devices."""
    lines = [f"import {name}" for name in sorted(writer.modules)]
    lines += ["", "import torch"] if lines else ["import torch"]
    if "gems" in writer.libraries:
        lines += ["", "import gems_compile.lowering.llm_losses  # makes torch.ops.gems"]
    lines += [""] if writer.devices else []
    for device, name in writer.devices.items():
        here = f'"{device}"'
        if device.type == "cuda":
            here += ' if torch.cuda.is_available() else "cpu"'
        lines.append(f"{name} = torch.device({here})")
    return "\n".join(lines)


class Writer:
    """Writes the functions of a graph, and notes what a file needs beside them."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.modules: set[str] = set()
        self.libraries: set[str] = set()
        self.devices: dict[torch.device, str] = {}
        self.symbols: dict[str, int] = {}
        self.cannot: list[str] = []
        self.notes: list[str] = []
        self.bodies: list[str] = []

    # functions -----------------------------------------------------------------------------------

    def function(self, name: str, gm: GraphModule) -> str:
        """``def name(...)`` of a graph; those of its nested graphs go to ``bodies``."""
        inputs = gm.graph.find_nodes(op="placeholder")
        return self.define(name, inputs, [n for n in gm.graph.nodes if n.op != "placeholder"], gm)

    def define(
        self, name: str, inputs: Iterable[Node], nodes: Iterable[Node], gm: GraphModule
    ) -> str:
        """``def name(inputs)`` of some nodes of a graph."""
        lines = [*_signature(name, [spelled(n) for n in inputs])]
        above = ""
        for node in nodes:
            where = _where(node)
            if where and where != above:
                lines.append(f"    # {where}")
                above = where
            lines.append("    " + self.line(node, gm))
        return "\n".join(lines)

    def line(self, node: Node, gm: GraphModule) -> str:
        if node.op == "output":
            results: Any = node.args[0]
            whole = isinstance(results, (list, tuple))
            return f"return {self.value(tuple(results) if whole else (results,))}"
        if node.op == "get_attr":
            return self.attribute(node, gm)
        if node.op != "call_function":
            self.cannot.append(f"{node.name} is a {node.op}")
            return f"{spelled(node)} = None"
        return f"{spelled(node)} = {self.call(node)}  # {describe(node.meta.get('val'))}"

    def call(self, node: Node) -> str:
        if node.target is operator.getitem:
            return f"{self.value(node.args[0])}[{self.value(node.args[1])}]"
        args = [self.value(a) for a in node.args]
        args += [f"{k}={self.value(v)}" for k, v in node.kwargs.items()]
        return f"{self.target(node)}({', '.join(args)})"

    def target(self, node: Node) -> str:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            library = target.namespace
            self.libraries.add(library)
            if target.name() == "gems::linear_cross_entropy":  # of all in ``llm``, it stays whole
                self.modules.add("gems_compile.llm")
            if library not in OWN_LIBRARIES and library != "gems":
                self.cannot.append(f"torch.ops.{library} is a library of the program's own")
            return f"torch.ops.{target}"
        if isinstance(target, torch._ops.HigherOrderOperator):
            if target.name() not in CALLABLE_BODIES:
                self.cannot.append(f"{target.name()} needs what the program holds")
            return f"torch.ops.higher_order.{target.name()}"
        name, module = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
        module = "operator" if module == "_operator" else module
        if module in ("math", "operator"):
            self.modules.add(module)
            return f"{module}.{name}"
        if getattr(torch, name, None) is target:
            return f"torch.{name}"
        self.cannot.append(f"{module}.{name} is a function of the program's own")
        return name or "unknown"

    # values --------------------------------------------------------------------------------------

    def value(self, value: Any) -> str:
        if isinstance(value, Node):
            return spelled(value)
        if isinstance(value, torch.Size) or type(value) is tuple:
            return f"({', '.join(map(self.value, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.value, (value.start, value.stop, value.step)))})"
        if isinstance(value, torch.device):
            return self.device(value)
        return self.literal(value)

    def literal(self, value: Any) -> str:
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return repr(self.example(value))
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        self.cannot.append(f"an argument is a {type(value).__name__}")
        return f"None  # {type(value).__name__}"

    def device(self, device: torch.device) -> str:
        if device not in self.devices:
            self.devices[device] = str(device).replace(":", "").upper()
        return self.devices[device]

    def example(self, size: Any) -> Any:
        """The value a symbolic size had when the graph was traced."""
        if isinstance(size, (bool, int, float)):
            return size
        node = size.node
        found = node.hint if _is_backed(node) else UNBACKED
        if getattr(node.expr, "is_symbol", False):
            self.symbols[str(node.expr)] = found
        return found

    def attribute(self, node: Node, gm: GraphModule) -> str:
        held = operator.attrgetter(str(node.target))(gm)
        if isinstance(held, GraphModule):
            body = f"body{len(self.bodies)}_{spelled(node)}"
            self.bodies.append("")  # keeps the number, while bodies inside this one are written
            place = len(self.bodies) - 1
            self.bodies[place] = self.function(body, held)
            return f"{spelled(node)} = {body}"
        if isinstance(held, torch.Tensor):
            return f"{spelled(node)} = {self.constant(node, held)}"
        self.cannot.append(f"{node.target} is a {type(held).__name__}")
        return f"{spelled(node)} = None  # {type(held).__name__}"

    def constant(self, node: Node, held: torch.Tensor) -> str:
        plain = held.layout == torch.strided and not held.is_quantized
        if plain and type(held) is torch.Tensor and held.numel() <= SMALL:
            with unset_fake_temporarily():  # a compile runs under a FakeTensorMode
                values = self.value(held.detach().cpu().tolist())
            return f"torch.tensor({values}, dtype={held.dtype}, device={self.device(held.device)})"
        self.notes.append(f"The constant {spelled(node)} is large; random values stand for it")
        return self.tensor(held)

    # inputs --------------------------------------------------------------------------------------

    def make_inputs(self) -> str:
        lines = [
            f"        {self.input(node)},  # {spelled(node)}"
            for node in self.gm.graph.nodes
            if node.op == "placeholder"
        ]
        return "\n".join(["def make_inputs():", "    return [", *lines, "    ]"])

    def input(self, node: Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
            return repr(self.example(value))
        if isinstance(value, torch.Generator):
            return f"torch.Generator({self.device(value.device)})"
        if value is None:
            return "None"
        self.cannot.append(f"input {node.name} is a {type(value).__name__}")
        return "None"

    def tensor(self, held: torch.Tensor) -> str:
        if held.layout != torch.strided or held.is_quantized:
            self.cannot.append("an input is sparse or quantised")
            return "None"
        shape = [self.example(s) for s in held.shape]
        stride = [self.example(s) for s in held.stride()]
        offset = self.example(held.storage_offset())
        tail = f", {offset}" if offset else ""
        return (
            f"tensor({self.value(shape)}, {self.value(stride)}, {held.dtype}, "
            f"{self.device(held.device)}{tail})"
        )


def _is_backed(node: Any) -> bool:
    try:
        return bool(node.has_hint())
    except AttributeError:
        return not any(str(s).startswith(("u", "zuf")) for s in node.expr.free_symbols)


def spelled(node: Node) -> str:
    """The variable of a node."""
    return f"{node.name}_" if node.name in RESERVED else node.name


def _signature(name: str, inputs: Iterable[str]) -> list[str]:
    inputs = list(inputs)
    short = f"def {name}({', '.join(inputs)}):"
    if len(short) <= 100:
        return [short]
    return [f"def {name}(", *(f"    {i}," for i in inputs), "):"]


def _where(node: Node) -> str:
    line, module = source_line(node), module_path(node)
    return f"{line}    [{module}]" if line and module else line or (f"[{module}]" if module else "")
