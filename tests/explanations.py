"""Explanations made by hand: a small one, one of 5,000 nodes, one whose texts would be markup; and
what a page of one knows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from gems_compile.dynamo import Recompile
from gems_compile.explain import Explanation
from gems_compile.insight.rewritten import NearMiss, Rewritten
from gems_compile.insight.summary import Call, Edge, GraphSummary, NodeFact

SOURCE = 'import triton\n\n@triton.jit\ndef fused_add_gelu(x_ptr):  # "why"\n    return 1.5\n'
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>&amp;\u2028"


def node(name: str, op: str, inputs: tuple[str, ...], step: int | None, **more: Any) -> NodeFact:
    fate = "free" if step is None else "fused"
    steps = () if step is None else (step,)
    more = {"line": f"model.py:{len(op)}  y = {op}(x)", "module": "", **more}
    return NodeFact(name, op, "f32[4, 8]", fate, "", inputs=inputs, steps=steps, **more)


def launch(name: str, key: str, ops: tuple[str, ...], module: str = "", **more: Any) -> Call:
    sizes = {"read": 100, "written": 50, "eager": 400, **more}
    modules, lines = (module,) if module else (), ("model.py:7  y = x",)
    return Call("kernel", name, ("f32[4, 8]",), ("f32[4, 8]",), key, ops, lines, modules, **sizes)


def aten(name: str, reason: str, module: str = "", **more: Any) -> Call:
    sizes = {"read": 60, "written": 40, "eager": 100, **more}
    modules, types = (module,) if module else (), ("f32[4, 8]",)
    return Call("aten", name, types, types, reason, (name,), (), modules, **sizes)


def small() -> Any:
    """x -> add, gelu (a kernel) -> view -> mm (ATen) -> mul (a kernel equal to a later one)."""
    nodes = (
        node("add", "add.Tensor", ("x",), 0, module="layers.0"),
        node("gelu", "gelu", ("add",), 0, module="layers.0"),
        node("view", "view", ("gelu",), None, module="layers.0"),
        node("mm", "mm", ("view", "w"), 1, module="layers.0.up"),
        node("mul", "mul.Tensor", ("mm",), 2, module="layers.0"),
        node("mul_1", "mul.Tensor", ("mul", "gelu"), 3, module="layers.1"),
    )
    calls = (
        launch("fused_add_gelu", "aaaa1111", ("add.Tensor", "gelu"), "layers.0"),
        aten("mm", "matrix products are left to the vendor's library", "layers.0.up", inputs=(0,)),
        launch("fused_mul", "bbbb2222", ("mul.Tensor",), "layers.0", inputs=(1,)),
        launch("fused_mul", "bbbb2222", ("mul.Tensor",), "layers.1", inputs=(0, 2)),
    )
    where = ("model.py:9  z", "layers.1")
    chains = (("p = torch.softmax(s, -1)  # f32[4, 8]", "o = torch.matmul(p, v)"), ("a = sdpa(q)",))
    graph = GraphSummary(
        0,
        "inference",
        nodes=nodes,
        calls=calls,
        unfused=(
            Edge("add", "gelu", "too wide", *where, 10, ("add", "mul")),
            Edge("mul", "mul", "waits", *where, 90, ("mul", "mul_1")),
            Edge("add", "gelu", "too wide", *where, 30, ("add", "mul")),
        ),
        rewritten=(
            Rewritten("attention", "less memory", 2, 1, "model.py:9  z", "layers.0", *chains, "aa"),
            Rewritten("attention", "less memory", 2, 1, *where, ("q_1",), ("a_1",), "aa"),
            Rewritten("attention", "less memory", 3, 1, *where, ("more",), (), "bb"),
        ),
        near_misses=(
            NearMiss("swiglu", "silu", "silu is also read by mul", "model.py:8  y", "layers.0"),
            NearMiss("swiglu", "silu_1", "silu_1 is also read by mul_2", *where),
        ),
        kernels=2,
        inputs={"x": "f32[4, 8]", "w": "f32[8, 8]"},
        outputs=("mul_1",),
        sources={"fused_add_gelu_aaaa1111": SOURCE},
        seconds={"fuse": 0.001},
    )
    again = Recompile(0, "0/1", "step", "model.py:3  x", "x changed", "pass one x", "x == 2", ())
    return Explanation(
        "model",
        "interpreter",
        (graph,),
        seconds={"Dynamo": 0.1},
        breaks={"print": 2},
        break_lines={"print": ("model.py:4  print(x)",)},
        recompiles=(again, replace(again, graph=7, function="step, behind line 4,")),
    )


def large(layers: int = 50, calls: int = 20) -> Any:
    """A training graph of 5,000 nodes: each of a layer's calls has four ops and a view."""
    nodes: list[NodeFact] = []
    steps: list[Call] = []
    last = "x"
    for layer in range(layers):
        for k in range(calls):
            step, module = len(steps), f"layers.{layer}.block.{'attn' if k < 10 else 'mlp'}"
            names = [f"n{step}_{j}" for j in range(5)]
            for j, name in enumerate(names):
                inputs = (last, f"n{step - 7}_4") if j == 0 and step >= 7 else (last,)
                where = {"line": f"model.py:{k}  y = op_{j}(x)", "module": module}
                nodes.append(node(name, f"op_{j}", inputs, step if j else None, **where))
                last = name
            ops = ("op_1", "op_2", "op_3", "op_4")
            before = {"inputs": tuple(k for k in (step - 7, step - 1) if k >= 0)}
            if k % 3 == 0:
                steps.append(
                    aten("mm", "matrix products are left to the vendor's library", module, **before)
                )
            else:
                steps.append(launch("fused_" + "_".join(ops), f"key{k:05}", ops, module, **before))
    sources = {f"{c.name}_{c.detail}": SOURCE * 20 for c in steps if c.kind == "kernel"}
    fired = tuple(_rewritten(layer, k) for layer in range(layers) for k in range(4))
    graph = GraphSummary(
        0,
        "forward",
        tuple(nodes),
        tuple(steps),
        rewritten=fired,
        kernels=14,
        sources=sources,
    )
    return Explanation("large", "nvidia sm90", (graph,))


def _rewritten(layer: int, k: int) -> Rewritten:
    before = tuple(f"n{layer}_{j} = torch.mul(x{layer}, y)  # f32[4, 8]" for j in range(8))
    where = (f"model.py:{k}  y = x", f"layers.{layer}.block")
    return Rewritten("norm", "one op", 8, 1, *where, before, before[:1], f"chain {k}")


def hostile() -> Any:
    explanation = small()
    (graph,) = explanation.graphs
    nodes = tuple(replace(n, line=HOSTILE, module=HOSTILE, op=HOSTILE) for n in graph.nodes)
    calls = tuple(
        replace(c, lines=(HOSTILE,), modules=(HOSTILE,), ops=(HOSTILE,)) for c in graph.calls
    )
    calls = (calls[0], replace(calls[1], detail=HOSTILE, name=HOSTILE), *calls[2:])
    edges = tuple(replace(e, reason=HOSTILE, line=HOSTILE) for e in graph.unfused)
    sources = {"fused_add_gelu_aaaa1111": HOSTILE + SOURCE}
    text = (HOSTILE,) * 2
    fired = Rewritten(*text, 4, 2, *text, before=text, after=text, alike=HOSTILE)
    graph = replace(
        graph,
        nodes=nodes,
        calls=calls,
        unfused=edges,
        rewritten=(fired,),
        near_misses=(NearMiss(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
        sources=sources,
        failures=(HOSTILE,),
    )
    return replace(
        explanation,
        name=HOSTILE,
        graphs=(graph,),
        breaks={HOSTILE: 1},
        break_lines={HOSTILE: (HOSTILE,)},
        recompiles=(Recompile(0, *(HOSTILE,) * 6, older=(HOSTILE,)),),
    )


class Page:
    """A page's file, read."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        (found,) = re.findall(
            r'<script type="application/json"[^>]*>(.*?)</script>', self.text, re.S
        )
        self.data: Any = json.loads(found)
        self.texts: list[str] = self.data["texts"]

    def boxes(self, graph: int = 0) -> list[Any]:
        return self.data["graphs"][graph]["boxes"]
