"""The nodes of a rewrite before and after: what is written of them, when, and equal layers once."""

from __future__ import annotations

import json
import operator
import re
from pathlib import Path

import pytest
import torch
from helpers import BACKEND, DEVICE, gems_only, rand
from torch import fx, nn

if BACKEND == "gems":
    import gems_compile
    from gems_compile import backend
    from gems_compile.backend import Gems
    from gems_compile.insight import rewritten
    from gems_compile.insight.dump_files import rewrites_text
    from gems_compile.insight.rewritten import alike, plain, without_numbers, written_out
    from gems_compile.lowering.grouped import share_keys
    from gems_compile.lowering.masks import read_constant_masks

pytestmark = gems_only

#: of float32, a GPU's fused attention is less exact, so that it is not taken
FUSED_ATTENTION = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Attention(nn.Module):
    def __init__(self, also_scores: bool = False) -> None:
        super().__init__()
        self.also_scores = also_scores

    def forward(self, x):
        scores = (x @ x.transpose(-2, -1) * 0.5).softmax(-1)
        mixed = scores @ x
        return (mixed, scores) if self.also_scores else mixed


class Layers(nn.Module):
    def __init__(self, count: int, also_scores: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(also_scores) for _ in range(count))
        self.also_scores = also_scores

    def forward(self, x):
        kept = []
        for layer in self.layers:
            x, *more = layer(x) if self.also_scores else (layer(x),)
            kept += more
        return x, kept


def heads(heads: int = 4) -> torch.Tensor:
    return rand(2, heads, 8, 8, dtype=FUSED_ATTENTION)


# the texts ---------------------------------------------------------------------------------------


def test_every_kind_of_node_is_a_line() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    weight = graph.get_attr("layer.weight")
    product = graph.create_node("call_function", torch.ops.aten.mm.default, (x, weight), name="mm")
    product.meta["val"] = torch.empty(2, 4, dtype=torch.bfloat16)
    gate = graph.call_function(nn.functional.silu, (product,), {"inplace": False})
    soft = graph.call_method("softmax", (gate, -1), {"dtype": torch.float32})
    part = graph.call_function(operator.getitem, (soft, (slice(None, 1), [x, None])))
    nodes = [part, x, soft, weight, gate, product]
    lines = written_out(nodes)
    assert plain(lines) == (
        "x = x  # f32[2, 3]",
        "layer_weight = layer.weight",
        "mm = aten.mm.default(x, layer_weight)  # bf16[2, 4]",
        "silu = F.silu(mm, inplace=False)",
        "softmax = silu.softmax(-1, dtype=torch.float32)",
        "getitem = operator.getitem(softmax, (slice(None, 1, None), [x, None]))",
    )
    assert lines[2].startswith("%mm = aten.mm.default(%x, %layer_weight)")


def test_what_cannot_be_written_stops_no_compile(monkeypatch, caplog) -> None:
    def fails(value: object) -> str:
        raise ValueError("no words")

    monkeypatch.setattr(rewritten, "describe", fails)
    with torch.no_grad(), caplog.at_level("WARNING", "gems_compile"):
        (graph,) = gems_compile.explain(Layers(1).to(DEVICE), heads()).graphs
    (fired,) = graph.rewritten
    assert (fired.nodes_before, fired.before, fired.after, fired.alike) == (4, (), (), "")
    assert "a rewrite's nodes are not told: ValueError: no words" in caplog.messages


def test_equal_chains_share_a_key_and_others_do_not() -> None:
    chain = alike(("%a = f(%x, %y)", "%b = g(%a)"), ("%c = h(%x)",))
    assert chain == alike(("%a_1 = f(%c, %d)", "%b_7 = g(%a_1)"), ("%e = h(%c)",))
    others = {
        alike(("%a = f(%x, %x)", "%b = g(%a)"), ("%c = h(%x)",)),  # one operand twice
        alike(("%a = f(%x, %y)", "%b = g(%a)"), ("%c = h(%y)",)),  # the other operand
        alike(("%a = f(%x, %y)", "%b = g(%a)  # f32[2]"), ("%c = h(%x)",)),
        alike(("%a = f(%x, %y)",), ("%b = g(%a)", "%c = h(%x)")),
    }
    assert len(others) == 4 and chain not in others
    assert alike((), ()) == ""


def test_reasons_of_equal_layers_differ_in_numbers_alone() -> None:
    assert without_numbers("softmax_12 is also used by add_3") == "softmax is also used by add"
    assert without_numbers("131072 columns; 2_d") == "131072 columns; 2_d"


# rewrites that fire ------------------------------------------------------------------------------


def test_a_rewrite_has_its_nodes_before_and_after() -> None:
    with torch.no_grad():
        found = gems_compile.explain(Layers(1).to(DEVICE), heads())
    (fired,) = found.graphs[0].rewritten
    assert len(fired.before) == fired.nodes_before and len(fired.after) == fired.nodes_after
    kind = "bf16" if DEVICE == "cuda" else "f32"
    assert all(line.endswith(f"  # {kind}[2, 4, 8, 8]") for line in fired.before)
    called = [re.sub(r"\w+ = \w+\.", "", line).partition("(")[0] for line in fired.before]
    assert called == ["matmul", "mul", "softmax", "matmul"]
    (attention,) = [line for line in fired.after if "scaled_dot_product_attention.default(" in line]
    operand = fired.before[0].partition("(")[2].partition(",")[0]
    assert f"default({operand}, " in attention
    assert fired.line.endswith("mixed = scores @ x") and fired.module == "layers.0"
    (data,) = json.loads(found.to_json())["graphs"][0]["rewritten"]
    assert (tuple(data["before"]), tuple(data["after"])) == (fired.before, fired.after)


def test_equal_layers_are_told_once() -> None:
    with torch.no_grad():
        (graph,) = gems_compile.explain(Layers(16).to(DEVICE), heads()).graphs
    assert len(graph.rewritten) == 16 and len({r.alike for r in graph.rewritten}) == 1
    assert len({r.before for r in graph.rewritten}) == 16  # the data has every layer's names
    text = rewrites_text(graph)
    assert text.count("attention x16: ") == text.count("before:") == text.count("after:") == 1
    assert "in layers.0, layers.1, layers.2, layers.3 ..." in text
    assert text.count("mixed = scores @ x") == 1
    for line in (*graph.rewritten[0].before, *graph.rewritten[0].after):
        assert f"        {line}\n" in text


def test_chains_of_other_types_are_told_apart() -> None:
    def fn(x, y):
        return Attention()(x), Attention()(y)

    with torch.no_grad():
        (graph,) = gems_compile.explain(fn, heads(4), heads(2)).graphs
    assert len(graph.rewritten) == 2
    assert rewrites_text(graph).count("attention: ") == 2


def test_near_misses_of_equal_layers_are_told_once() -> None:
    with torch.no_grad():
        (graph,) = gems_compile.explain(Layers(4, True).to(DEVICE), heads()).graphs
    assert len(graph.near_misses) == 4
    text = rewrites_text(graph)
    assert text.count("attention x4 at ") == 1 and "scores is also returned" in text
    assert "in layers.0, layers.1, layers.2, layers.3" in text


def traced(fn, *args) -> fx.GraphModule:
    """Dynamo's graph."""
    kept: list[fx.GraphModule] = []

    def keep(gm, inputs):
        kept.append(gm)
        return gm

    torch.compile(fn, backend=keep, fullgraph=True)(*args)
    return kept[0]


def test_a_mask_that_is_read_has_the_call_before_and_after() -> None:
    def fn(q):
        mask = torch.ones(8, 8, dtype=torch.bool, device=q.device).tril()
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    (fired,) = read_constant_masks(traced(fn, heads()), written_out).fired
    (before,), (after,) = plain(fired.before), plain(fired.after)
    assert "F.scaled_dot_product_attention(" in before and "attn_mask=mask" in before
    assert "attn_mask" not in after and "is_causal=True" in after


def test_shared_keys_have_the_copies_before(monkeypatch) -> None:
    from gems_compile.lowering import grouped

    def fn(q, k):
        many = k[:, :, None].expand(2, 2, 2, 8, 8).reshape(2, 4, 8, 8)
        return nn.functional.scaled_dot_product_attention(q, many, many)

    monkeypatch.setattr(grouped, "_has_kernel", lambda **_: True)
    (fired,) = share_keys(traced(fn, heads(4), heads(2)), written_out).fired
    before, (after,) = plain(fired.before), plain(fired.after)
    assert len(before) == fired.nodes_before == 4
    assert [
        what in line for what, line in zip(("getitem", "expand", "reshape"), before, strict=False)
    ]
    assert "enable_gqa=True" in after and "reshape" not in after


# when they are written ---------------------------------------------------------------------------


def test_nobody_writes_nodes_where_nobody_asked(monkeypatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def count(nodes):
        asked.append(1)
        return rewritten.written_out(nodes)

    monkeypatch.setattr(backend, "written_out", count)
    monkeypatch.delenv("GEMS_DUMP", raising=False)
    own = Gems()
    torch.compile(Layers(1).to(DEVICE), backend=own)(heads())
    (fired,) = own.reports[0].rewrites.fired
    assert asked == [] and (fired.before, fired.after) == ((), ())
    assert fired.nodes_before > fired.nodes_after
    torch._dynamo.reset()
    torch.compile(Layers(1).to(DEVICE), backend=Gems(), options={"dump": tmp_path})(heads())
    assert len(asked) == 2
    assert "before:" in (tmp_path / "graph_00_inference" / "rewrites.txt").read_text()


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_that_vary_are_written(dynamic: bool, tmp_path: Path) -> None:
    with torch.no_grad():
        fn = torch.compile(Layers(2), backend=Gems(), options={"dump": tmp_path}, dynamic=dynamic)
        fn(heads())
    text = (tmp_path / "graph_00_inference" / "rewrites.txt").read_text()
    assert "attention x2: " in text
    assert ("[s" in text) == dynamic
