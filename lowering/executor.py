"""Plan + kernels -> a callable: one generated Python function, straight-line.

The function takes one list of inputs and clears it, so that every tensor dies at its last use, as
in eager mode. Views are resolved to (base, size, stride, offset) when ATen needs the tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .cut import ALIGNED, PROFILED, Cut
from .graph import is_view, mutated_arguments
from .group import Group, Plan
from .indexing import Size, is_static, size_of
from .inplace import plan_in_place
from .ir import SizeArg, Value, base_of, first_place
from .kept import KEPT
from .ledger import Ledger
from .matrix_products import Products
from .order import batches, together
from .packed import Packs, is_packed, is_unpacked
from .runs import ADDRESS, GRID, NUMBERS, TENSOR, Launch, Operand, Runs
from .scratch import Slab, plan_scratch
from .seeds import Seeds
from .source import NUMBER, Source
from .symbols import Symbols
from .translate import Program
from .widths import Widths

#: ATen calls whose results are fresh, aligned and laid out as their FakeTensors say
TRUSTED = {"mm", "bmm", "addmm", "baddbmm", "product", "joined_products"}
TRUSTED |= {"_softmax", "embedding", "native_layer_norm"}

#: calls whose libraries choose the layout: a backward relies on the strides of what is saved
CHOOSING = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class Writer:
    """Writes the function. ``sources`` belong to the plan's groups. ``views``: results that view
    inputs have a ``_base``; for inference AOTAutograd makes such results again from the inputs."""

    def __init__(
        self,
        gm: GraphModule,
        program: Program,
        plan: Plan,
        device: torch.device,
        sources: dict[Group, Source],
        views: bool = True,
        cut: Cut | None = None,
    ) -> None:
        self.views = views
        self.gm, self.program, self.plan, self.device = gm, program, plan, device
        self.sources, self.cut = sources, cut
        self.names: dict[Any, str] = {}  # node or Value -> variable
        self.constants: dict[str, Any] = {}
        self.lines: list[str] = []
        self.uses: dict[str, int] = {}  # variable -> last line that uses it
        self.symbols = Symbols()
        self.aligned: dict[Value, str] = {}  # input or ATen's view -> variable that kernels read
        self.settled: dict[Value, tuple[str, str]] = {}  # of those, ATen's views: and their strides
        self.kept: set[str] = set()  # variables that are not tensors to free
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.kernels: list[tuple[str, Group]] = []
        escapes = plan.escapes | cut.crossing if cut is not None else plan.escapes
        self.slab = Slab(self, *plan_scratch(plan.steps, sources, escapes))
        self.scratch = self.slab.offsets
        self.packs = Packs(self)
        apart = {*self.scratch, *self.packs.made, *self.packs.read}
        self.in_place = plan_in_place(gm, program, plan, sources, apart)
        if cut is not None:
            self.in_place = cut.within_parts(self.in_place)
        self.ledger = Ledger()
        self.widths, self.runs, self.seeds = Widths(self), Runs(self), Seeds(self)
        self.products = Products(self)
        self.launches = 0
        self.calls = 0

    # text ----------------------------------------------------------------------------------------

    def constant(self, value: Any, prefix: str = "c") -> str:
        for name, known in self.constants.items():
            if known is value and name[0] == prefix:  # what is called has a quicker form
                return name
        name = f"{prefix}{len(self.constants)}"
        self.constants[name] = value
        return name

    def size(self, size: Size) -> str:
        return self.symbols.text(size)

    def sizes(self, sizes: Sequence[Size]) -> str:
        inner = ", ".join([self.size(s) for s in sizes])
        return f"({inner},)" if sizes else "()"

    def arg(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.node(value)
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.arg(v) for v in value)
            if isinstance(value, tuple):
                return f"({inner}{',' if len(value) == 1 else ''})"
            return f"[{inner}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.arg(v)}" for k, v in value.items()) + "}"
        if isinstance(value, torch.SymInt):
            return self.size(size_of(value))
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, float):
            return repr(value)
        return self.constant(value)

    def node(self, node: Node) -> str:
        """The text that yields a node's result."""
        if node in self.names:
            return self.use(self.names[node])
        entry: Any = self.program.of.get(node)
        if isinstance(entry, SizeArg):
            return self.size(entry.expr)
        if isinstance(entry, int):
            return str(entry)
        if isinstance(entry, (tuple, list)):
            raise KeyError(f"{node.name} is used whole")
        return self.value(entry, node)

    def value(self, v: Value, node: Node) -> str:
        if v in self.names:
            whole = self.use(self.names[v])
            return whole if v.kind != "reduce" else self._reinterpret(whole, v, v, node)
        base = base_of(v)
        if base in self.names:
            whole = self.use(self.names[base])
            if base in self.settled:  # a copy of it may be aligned alone: then it is the view still
                own, strides = self.settled[base]
                whole = f"{whole} if {whole}.stride() == {strides} else {self.use(own)}"
            return self._reinterpret(whole, v, base, node)
        raise KeyError(f"{v!r} is not in memory")

    def _reinterpret(self, whole: str, v: Value, base: Value, node: Node) -> str:
        val = node.meta["val"]
        offset = first_place(v)
        shape = [size_of(s) for s in val.shape]
        strides = [size_of(s) for s in val.stride()]
        if v is base and tuple(shape) == v.shape:
            return whole
        return f"view({whole}, {self.sizes(shape)}, {self.sizes(strides)}, {self.size(offset)})"

    def use(self, name: str) -> str:
        self.uses[name] = len(self.lines)
        return name

    def add(self, line: str, comment: str = "") -> None:
        self.lines.append(f"{line}  # {comment}" if comment else line)

    # the function --------------------------------------------------------------------------------

    def write(self) -> str:
        self._unpack()
        if self.cut is None:
            self._write_steps(self.plan.steps)
        else:
            for part in self.cut.parts:
                self.cut.begins(self)
                self._write_steps(part.steps)
                self.cut.ends(self, part)
        results = self._results()
        if self.cut is not None:
            self.runs.gather(self.cut.starts)
            return self.cut.assemble(self, results)
        self.add(f"return ({', '.join(results)}{',' if len(results) == 1 else ''})")
        self.runs.gather()
        return self._assemble()

    def _write_steps(self, steps: Sequence[Any]) -> None:
        self.packs.begins(steps)
        for batch in batches(steps):
            if len(batch) > 1:
                self._call_together(batch)
            elif isinstance(batch[0], Group):
                self._launch(batch[0])
            else:
                self._call(batch[0])

    def _unpack(self) -> None:
        names = []
        for k, node in enumerate(self.placeholders):
            name = f"i{k}"
            self.names[node] = name
            value = self.program.of.get(node)
            if isinstance(value, Value):
                self.names[value] = name
            names.append(name)
        if names:
            self.add(f"{', '.join(names)}{',' if len(names) == 1 else ''} = args")
        self.add("args.clear()")
        self.slab.stand_in_parts()
        for node in self.placeholders:
            self._learn_symbols(node)
        self._align()

    def _align(self) -> None:
        """Kernels read a copy of an input whose data starts off a 16-byte boundary.

        What kernels store there goes back at once. An input that ATen writes is read where it is,
        by kernels that assume nothing. One line for all inputs: Python takes 20 us to compile one.
        """
        names: dict[str, str] = {}
        for node in self.placeholders:
            value = self.program.of.get(node)
            if not isinstance(value, Value) or value.op == "opaque" or value in self.plan.written:
                continue
            if self.read_by_kernel(value) or value in self.packs.sources:
                name = self.names[node]
                self.aligned[value] = f"x{name[1:]}"
                names[self.aligned[value]] = self.use(name)
        if names and self.cut is None:  # else every part has such a line
            self.add(ALIGNED.format(names=", ".join(names), inputs=", ".join(names.values())))

    def _learn_symbols(self, node: Node) -> None:
        val, name = node.meta.get("val"), self.names[node]
        if isinstance(val, torch.SymInt):
            self.symbols.note(val, name)
            self.kept.add(name)
        elif isinstance(val, torch.Tensor) and val.layout == torch.strided:
            for line in self.symbols.learn(val, name):
                self.use(name)
                self.add(line)

    def read_by_kernel(self, value: Value) -> bool:
        if not hasattr(self, "_inputs"):
            self._inputs = {
                what for s in self.sources.values() for _, role, what in s.params if role == "in"
            }
        return value in self._inputs

    def _launch(self, group: Group) -> None:
        source = self.sources[group]
        for out in group.outputs:
            if out not in self.scratch and out not in self.packs.made:
                self._allocate(out)
        for copy, memory in group.stores.items():
            self.names[copy], self.aligned[copy] = self.names[memory], self.aligned[memory]
        self.slab.begin(source)
        kernel = f"k{len(self.kernels)}"
        self.kernels.append((kernel, group))
        self.launches += 1
        flag = self.widths.flag(kernel, group, source)
        kinds = (NUMBERS.get(kind, TENSOR) for kind in source.meta["signature"].values())
        args = [
            self._argument(kind, role, what)
            for kind, (_, role, what) in zip(kinds, source.params, strict=True)
        ]
        grid = self._number(GRID, source.grid)
        self.runs.launch(Launch(kernel, source.name, grid, args, flag, source.waits))
        places = [base_of(m.params[0]) for m in group.members if m.kind == "store"]
        for memory in dict.fromkeys([*group.stores.values(), *places]):
            if memory in self.aligned:
                own, read = self.use(self.names[memory]), self.use(self.aligned[memory])
                self.add(f"if {read} is not {own}: {own}.copy_({read})")

    def _allocate(self, out: Value) -> None:
        name, operand = f"b{out.id}", self.in_place.get(out)
        if operand is not None and (operand.shape, operand.strides) == (out.shape, out.strides):
            self.names[out] = self.names[operand]
            return
        self.names[out] = name
        if operand is not None:
            whole = self.use(self.names[operand])
            self.ledger.share(name, whole)
            self.runs.ahead(
                f"{name} = view({whole}, {self.sizes(out.shape)}, {self.sizes(out.strides)}, 0)"
            )
            return
        dtype = getattr(torch, out.dtype)
        self._empty(name, out, dtype, self.sizes(out.shape), self.sizes(out.strides))

    def allocate(self, name: str, val: torch.Tensor) -> None:
        """Let the variable hold a new tensor that lies as ``val`` does."""
        shape, strides = ([size_of(n) for n in ns] for ns in (val.shape, val.stride()))
        self._empty(name, val, val.dtype, self.sizes(shape), self.sizes(strides))

    def _empty(self, name: str, what: Any, dtype: torch.dtype, shape: str, strides: str) -> None:
        self.ledger.allocate(name, len(self.lines), what)
        self.runs.ahead(f"{name} = empty({shape}, {strides}, {self.constant(dtype, 'd')})")

    def _argument(self, kind: str, role: str, what: Any) -> Operand:
        if role == "size":
            return self._number(kind, what)
        return self.seeds.number(what) if role == NUMBER else self._operand(what)

    def _number(self, kind: str, size: Any) -> Operand:
        text = self.size(size)
        return Operand(kind, plus=int(text)) if is_static(size) else Operand(kind, text)

    def _operand(self, value: Value) -> Operand:
        """Where a tensor is."""
        if value in self.scratch:
            self.use("scratch")
            return Operand(ADDRESS, "s0", self.scratch[value])
        if value in self.packs:
            return self.packs.operand(value)
        return Operand(TENSOR, self.use(self.aligned.get(value) or self.names[value]))

    def _call(self, node: Node) -> None:
        if node.op == "get_attr":
            self.names[node] = self.constant(operator.attrgetter(str(node.target))(self.gm), "g")
            self._alias(node)
            return
        if KEPT in node.meta:
            self._kept_weights(node)
            return
        if is_packed(node) or is_unpacked(node):
            self.packs.call(node)
            return
        name = f"a{len(self.names)}"
        value = self.program.of.get(node)
        if isinstance(value, Value) and value.kind == "full":
            self._fill(name, value, node)
            return
        if isinstance(value, Value) and self.seeds.draws(value):
            self.seeds.draw(name, value, node)
            return
        if self.products.call(name, node) or node in self.names:
            return
        function = self.constant(node.target, "f")
        args = [self.arg(a) for a in node.args]
        args += [f"{k}={self.arg(v)}" for k, v in node.kwargs.items()]
        self.enter(name, node)
        if node.target is operator.getitem:
            self.add(f"{name} = {args[0]}[{args[1]}]")
        else:
            self.calls += 1
            self.add(f"{name} = {function}({', '.join(args)})")
        self.named(node, name)
        self._settle(node, name)
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and not is_static(size_of(val)):
            self.symbols.note(val, name)
            self.kept.add(name)

    def named(self, node: Node, name: str) -> None:
        """The variable holds the node's result, which lies as the graph says."""
        self.names[node] = name
        self._alias(node)

    def _kept_weights(self, first: Node) -> None:
        """All weights that are kept in another layout, at the first of them."""
        if first in self.names:
            return
        nodes = [n for n in self.gm.graph.nodes if KEPT in n.meta]
        sources = ", ".join(self.arg(n.args[0]) for n in nodes)
        for node in nodes:
            self.names[node] = f"a{len(self.names)}"
            self._alias(node)
        self.add(f"{', '.join(self.names[n] for n in nodes)}, = kept({sources})")

    def enter(self, name: str, node: Node) -> None:
        """Note what memory the result of a call holds."""
        args: Any = node.args
        if node.target is operator.getitem:
            self.ledger.share(name, self.names.get(args[0]), args[1])
        elif is_view(node) or any(mutated_arguments(node)):
            whole = node.all_input_nodes[0]
            value = self.program.of.get(whole)
            base = base_of(value) if isinstance(value, Value) else whole
            self.ledger.share(name, self.names.get(whole) or self.names.get(base))
        else:
            self.ledger.allocate(name, len(self.lines), node.meta.get("val"))

    def _fill(self, name: str, value: Value, node: Node) -> None:
        """A constant tensor; what it was made in the likeness of need not be in memory."""
        dtype = self.constant(getattr(torch, value.dtype), "d")
        number = value.args[0]
        text = self.size(number.expr) if isinstance(number, SizeArg) else self.arg(number)
        shape, strides = self.sizes(value.shape), self.sizes(value.strides)
        self.ledger.allocate(name, len(self.lines), value)
        self.add(f"{name} = empty({shape}, {strides}, {dtype}).fill_({text})")
        self.calls += 1
        self.names[node] = self.names[value] = name

    def _call_together(self, nodes: list[Node]) -> None:
        """Several updates of inputs (running statistics, counters) in one call."""
        function, operands = together(nodes)
        texts = [
            f"[{', '.join(map(self.arg, o))}]" if isinstance(o, list) else self.arg(o)
            for o in operands
        ]
        self.calls += 1
        self.add(f"{self.constant(function, 'f')}({', '.join(texts)})")
        for node in nodes:
            self.names[node] = self.names[node.args[0]]
            self._alias(node)

    def _alias(self, node: Node) -> None:
        value = self.program.of.get(node)
        if isinstance(value, Value):
            base = base_of(value)
            if base is value or (base.kind == "buffer" and base.node is node):
                self.names[base] = self.names[node]

    def _settle(self, node: Node, name: str) -> None:
        """Check the layout of an ATen result that addresses are computed for."""
        value, val = self.program.of.get(node), node.meta.get("val")
        value = base_of(value) if isinstance(value, Value) else value
        if not isinstance(value, Value) or value.op == "opaque" or value.kind == "full":
            return
        if not isinstance(val, torch.Tensor) or val.device != self.device:
            return
        args: Any = node.args
        target = args[0].target if node.target is operator.getitem else node.target
        if getattr(target, "_opname", None) in TRUSTED:
            return
        leaves = any(user.op == "output" for user in node.users)
        read = self.read_by_kernel(value) or value in self.viewed or value in self.products.read
        if read or (leaves and target in CHOOSING):
            own, strides = name, self.sizes([size_of(s) for s in val.stride()])
            if is_view(node):  # who it is returned to, or who views it, wants its base
                own = self.aligned[value] = f"{name}s"
                self.settled[value] = own, strides
                self.ledger.share(own, name)
            self.add(f"{own} = settle({self.use(name)}, {strides})")

    @property
    def viewed(self) -> set[Value]:
        """Values of which ATen reads a view."""
        if not hasattr(self, "_viewed"):
            self._viewed = {
                base_of(e)
                for e in self.program.of.values()
                if isinstance(e, Value) and e.kind == "view"
            }
        return self._viewed

    def _results(self) -> list[str]:
        (out,) = (n for n in self.gm.graph.nodes if n.op == "output")
        results = out.args[0]
        results = results if isinstance(results, (list, tuple)) else (results,)
        return [self._result(r) for r in results]

    def _result(self, result: Any) -> str:
        """A result; a view of an input is made by ATen where somebody may ask for its base."""
        entry = self.program.of.get(result) if isinstance(result, Node) else None
        if isinstance(entry, Value) and entry.kind == "view" and result not in self.names:
            base = base_of(entry)
            if base.node is not None and base.node.op == "placeholder":
                text = self.value(entry, result)
                return f"input_{text}" if self.views and text.startswith("view(") else text
        return self.arg(result)

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that the function's own tensors take at once; None if not known."""
        return self.ledger.peak(self.uses, len(self.lines))

    def _assemble(self) -> str:
        """Put a ``del`` behind every variable's last use."""
        dead: dict[int, list[str]] = {}
        for name, last in self.uses.items():
            if last < len(self.lines) - 1 and name not in self.kept and name not in self.constants:
                dead.setdefault(last, []).append(name)
        body = []
        for k, line in enumerate(self.lines):
            if line:  # else a launch that a later line makes
                body.append(line)
            if k in dead:
                body.append(f"del {', '.join(dead[k])}")
        if self.runs.made:
            on_gpu = self.device.type != "cpu"
            body.insert(0, f"stream = {'current_stream()' if on_gpu else None}")
        body.insert(0, PROFILED)
        return "def call(args):\n" + "".join(f"    {line}\n" for line in body)
