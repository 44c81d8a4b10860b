"""What ``replay.py`` needs, written: the kernels of a graph, their references, and how they are
called, as text and plain JSON. Dumps have it of whole graphs, and ``verify`` of a launch that it
found to be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..lowering.graph import is_tensor, kernel_device, value_of
from ..lowering.group import Plan
from ..lowering.indexing import size_of
from ..lowering.ir import Value
from ..lowering.report import Report
from ..lowering.symbols import hints_of
from ..lowering.translate import Program
from .reference_text import References, Sizes, shown
from .references import Reference, find_references, names_of
from .runnable import TENSOR, spelled
from .summary import op_name, steps_of

Write = Callable[[str, str], None]  # a file's name, its text

REPLAY = '''"""Run the kernels of this folder beside what eager PyTorch computes in their place.

    python replay.py --check     each launch against its reference; exits with 1 if one differs
    python replay.py --bench     microseconds, GB/s and share of the peak, beside eager's
    python replay.py --bisect    the whole graph, fed with eager's values: who differs first

--group NAME: one kernel only; --inputs FILE: tensors that were saved. Kernels may be edited.
"""

from pathlib import Path

from gems_compile.insight.replay import main

if __name__ == "__main__":
    raise SystemExit(main(Path(__file__).resolve().parent))
'''


def write_replay(
    write: Write,
    gm: GraphModule,
    program: Program,
    references: Sequence[Reference],
    sizes: Sizes,
    device: torch.device,
    plan: Plan | None = None,
    told: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Writes ``references.py`` and ``replay.py``; what ``report.json`` must hold beside. Without a
    ``plan`` the launches alone are known: neither ATen's calls nor the whole graph. ``told`` gets
    the first reference of each kernel, as comments."""
    writer = References(gm, program, sizes)
    texts: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    names = names_of(references)
    for r in references:
        before = len(writer.cannot), len(writer.notes)
        text = "" if r.why_not else writer.reference(r)
        texts += [text] if text else []
        if told is not None:
            told.setdefault(r.source.key, shown(r, text))
        said = [*writer.cannot[before[0] :], *writer.notes[before[1] :]]
        calls[r.place] = {**_launch(r, names, sizes), "cannot": "; ".join(dict.fromkeys(said))}
    nodes = {v: n for r in references for n, v in (*r.reads.items(), *r.results)}
    data: dict[str, Any] = {"device": device.type}
    if plan is not None:
        graph, more = _whole_graph(writer, plan, program, names)
        texts += more
        calls.update(graph.pop("calls"))
        data.update(graph)
    title = '"""What eager PyTorch computes for each launch of this folder\'s graph."""'
    blocks = [f"{title}\n\n{writer.head()}", TENSOR.strip(), *writer.bodies, *texts]
    write("references.py", "\n\n\n".join(blocks) + "\n")
    write("replay.py", REPLAY)
    data["calls"] = [calls[k] for k in sorted(calls)]
    data["values"] = {name: _geometry(v, nodes.get(v, v.node), sizes) for v, name in names.items()}
    return data


def replay_of(report: Report, write: Write) -> tuple[dict[str, Any], dict[str, str]]:
    """Writes the files of a whole graph; what ``report.json`` must hold beside, and what each
    kernel's file says of its reference, by the kernel's key. Nothing where ATen runs all."""
    plan, program = report.plan, report.program
    node = next(iter(program.of), None) if program is not None else None
    if plan is None or program is None or node is None or not isinstance(node, Node):
        return {}, {}
    gm = node.graph.owning_module
    assert gm is not None  # whose graph was compiled
    found = list(find_references(program, plan, report.source_of).values())
    sizes = Sizes(hints_of(node.graph))
    device = kernel_device(gm, "cuda" if torch.cuda.is_available() else "cpu")
    told: dict[str, str] = {}
    data = write_replay(write, gm, program, found, sizes, device, plan, told)
    return data, told


def file_of(reference: Reference) -> str:
    """The file of a launch's kernel."""
    name = re.sub(r"\W", "_", reference.source.name)[:80]
    return f"kernels/{name}_{reference.source.key[:8]}.py"


def _geometry(value: Value, node: Node | None, sizes: Sizes) -> dict[str, Any]:
    """``node``: whose value it is, in the graph."""
    shape, stride = sizes.all(value.shape), sizes.all(value.strides)
    name = "" if node is None else spelled(node)
    return {"dtype": value.dtype, "shape": shape, "stride": stride, "node": name}


def _launch(r: Reference, names: dict[Value, str], sizes: Sizes) -> dict[str, Any]:
    """How a launch is made, and what it is compared with."""
    params = [
        {
            "name": name,
            "role": role,
            "value": sizes(what) if role == "size" else names.get(what, ""),
        }
        for name, role, what in r.source.params
    ]
    reads = [(spelled(n), names[v], sizes.all(_shape(n))) for n, v in r.reads.items()]
    return {
        "place": r.place,
        "kind": "kernel",
        "name": r.name,
        "file": file_of(r),
        "grid": sizes(r.source.grid),
        "meta": r.source.meta,
        "dtypes": r.source.pointer_dtypes,
        "params": params,
        "loaded": [names[v] for v in r.loaded],
        "stored": [names[v] for v in r.stored],
        "reads": [{"node": n, "value": v, "shape": s} for n, v, s in reads],
        "results": [{"node": spelled(x.node), "value": names[x.value]} for x in r.results],
        "unnamed": {names.get(v, f"v{v.id}"): why for v, why in r.unnamed.items()},
        "after": list(r.after),
        "function": r.function,
        "why_not": r.why_unchecked,
        "eps": narrowest(r),
        "length": length_of(r, sizes),
        "lines": r.lines(),
    }


def _shape(node: Node) -> list[Any]:
    return [size_of(n) for n in value_of(node).shape]


def narrowest(r: Reference) -> float:
    """The precision of the least precise intermediate; of what its kernels compute in, at best."""
    results = {x.node for x in r.results}
    between = [value_of(n) for n in r.nodes if n not in results]
    tensors = [t for val in between for t in (val if isinstance(val, (tuple, list)) else [val])]
    dtypes = {t.dtype for t in tensors if is_tensor(t) and t.dtype.is_floating_point}
    ends = [v.dtype for v in (*r.reads.values(), *(x.value for x in r.results))]
    floats = {d for d in ends if d.startswith(("float", "bfloat"))}
    least = torch.float64 if floats == {"float64"} else torch.float32
    return max(torch.finfo(d).eps for d in (least, *dtypes))


def length_of(r: Reference, sizes: Sizes) -> int:
    """Of how many terms its reductions are, all steps taken together."""
    return math.prod(max(map(sizes, step.lengths), default=1) for step in (*r.along, r))


# the whole graph ----------------------------------------------------------------------------------


def _whole_graph(
    writer: References, plan: Plan, program: Program, names: dict[Value, str]
) -> tuple[dict[str, Any], list[str]]:
    """What ``--bisect`` and ``--bench`` know beyond launches: ``graph`` runs all, and a function
    each ATen call."""
    graph, gm = next(iter(program.of)).graph, writer.gm
    texts, calls = [], {}
    whole = _Kept(gm, program, writer)
    texts.append(whole.text(graph, names))
    texts.append(whole.inputs(graph))
    steps = steps_of(plan)
    for place, step in enumerate(steps):
        if isinstance(step, Node):
            calls[place], text = _aten(writer, place, step)
            texts += [text] if text else []
    writer.bodies = [*whole.bodies, *writer.bodies]
    writer.modules |= whole.modules
    writer.libraries |= whole.libraries
    writer.devices.update(whole.devices)
    cannot = "; ".join(dict.fromkeys([*whole.cannot, *whole.notes]))
    inputs = [spelled(n) for n in graph.find_nodes(op="placeholder")]
    return {"calls": calls, "cannot": cannot, "inputs": inputs}, texts


class _Kept(References):
    """Writes the graph as a function that tells ``keep`` of every value."""

    def __init__(self, gm: GraphModule, program: Program, other: References) -> None:
        super().__init__(gm, program, other.sizes)

    def text(self, graph: Graph, names: dict[Value, str]) -> str:
        self.kept = {
            node
            for node, entry in self.program.of.items()
            if isinstance(entry, Value) and is_tensor(value_of(node))
        }
        inputs = graph.find_nodes(op="placeholder")
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        text = self.define("graph", [], nodes, self.gm)
        unpack = ", ".join(map(spelled, inputs))
        head = [f"    {unpack}{',' if len(inputs) == 1 else ''} = inputs"] if inputs else []
        head += [f"    {self._keep(n)}" for n in inputs if n in self.kept]
        first, _, rest = text.partition("\n")
        first = first.replace("def graph()", "def graph(inputs, keep)")
        return "\n".join([first, *head, rest, "    return None"])

    def line(self, node: Node, gm: GraphModule) -> str:
        text = super().line(node, gm)
        return f"{text}\n    {self._keep(node)}" if node in self.kept and gm is self.gm else text

    @staticmethod
    def _keep(node: Node) -> str:
        return f'keep("{spelled(node)}", {spelled(node)})'

    def inputs(self, graph: Graph) -> str:
        lines = [
            f"        {self.input(n)},  # {spelled(n)}" for n in graph.find_nodes(op="placeholder")
        ]
        return "\n".join(["def make_inputs():", "    return [", *lines, "    ]"])


def _aten(writer: References, place: int, node: Node) -> tuple[dict[str, Any], str]:
    """One of ATen's calls: how it is timed."""
    cannot = len(writer.cannot)
    data: dict[str, Any] = {"place": place, "kind": "aten", "name": op_name(node)}
    try:
        text = writer.call_of(f"call_{place}", node)
        made = [
            writer.input(n) if is_tensor(value_of(n)) else repr(writer.example(value_of(n)))
            for n in node.all_input_nodes
        ]
    except (KeyError, AttributeError, TypeError):  # sizes that depend on data, nested graphs
        return {**data, "cannot": "an operand of it is not known"}, ""
    said = "; ".join(dict.fromkeys(writer.cannot[cannot:]))
    del writer.cannot[cannot:]
    if said:
        return {**data, "cannot": said}, ""
    operands = f"def operands_{place}():\n    return [{', '.join(made)}]"
    return {**data, "function": f"call_{place}", "cannot": ""}, f"{text}\n\n\n{operands}"


def kernels_of(references: Iterable[Reference]) -> dict[str, str]:
    """The files of launches' kernels, and their texts."""
    return {file_of(r): r.source.commented for r in references}


__all__ = ["file_of", "kernels_of", "length_of", "narrowest", "replay_of", "write_replay"]
