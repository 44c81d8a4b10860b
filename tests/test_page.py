"""What the page of an explanation knows, where its boxes stand, and that no text is markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import processor_seconds
from helpers import BACKEND, DEVICE, gems_only, rand
from torch import nn

if BACKEND == "gems":
    from explanations import HOSTILE, SOURCE, Page, aten, hostile, large, small

    import gems_compile
    from gems_compile import page
    from gems_compile.explain import Explanation
    from gems_compile.insight.summary import GraphSummary
    from gems_compile.page import data, layout

pytestmark = gems_only


def written(explanation: Any, path: Path, times: Any = None) -> Page:
    explanation.to_html(path, times)
    return Page(path)


# what it knows ------------------------------------------------------------------------------------


def test_a_box_is_a_call_and_shows_its_nodes_and_the_views_that_it_reads_through(tmp_path) -> None:
    found = written(small(), tmp_path / "page.html")
    names = [found.texts[box["name"]] for box in found.boxes()]
    assert names == ["fused_add_gelu", "mm", "fused_mul", "fused_mul"]
    assert [box["nodes"] for box in found.boxes()] == [[0, 1], [3], [4], [5]]
    assert [box["views"] for box in found.boxes()] == [[], [2], [], []]
    assert found.data["sources"] == {"fused_add_gelu_aaaa1111": SOURCE}


def test_edges_are_what_calls_read(tmp_path) -> None:
    graph = written(small(), tmp_path / "page.html").data["graphs"][0]
    assert graph["edges"] == [[0, 1], [1, 2], [0, 3], [2, 3]]


def test_a_view_of_an_output_stands_with_what_it_looks_at() -> None:
    nodes = [
        {"name": "a", "inputs": [], "steps": [0]},
        {"name": "v", "inputs": ["a"], "steps": []},
        {"name": "alone", "inputs": ["x"], "steps": []},
    ]
    assert data._homes(nodes, {"a": 0, "v": 1, "alone": 2}) == [0, 0, None]


def test_equal_kernels_are_one_row_and_the_most_saved_comes_first(tmp_path) -> None:
    explanation = small()
    (graph,) = explanation.graphs
    more = replace(graph.calls[0], eager=10_000)
    graph = replace(graph, calls=(more, *graph.calls[1:]))
    found = written(replace(explanation, graphs=(graph,)), tmp_path / "page.html")
    rows = found.data["graphs"][0]["saved"]
    assert [(r["name"], r["steps"], r["moved"], r["saved"]) for r in rows] == [
        ("fused_add_gelu", [0], 150, 9850),
        ("fused_mul", [2, 3], 300, 500),
    ]


def test_edges_that_were_not_fused_are_folded_and_the_largest_comes_first(tmp_path) -> None:
    graph = written(small(), tmp_path / "page.html").data["graphs"][0]
    rows = [(r["producer"], r["reason"], r["times"], r["bytes"]) for r in graph["unfused"]]
    assert rows == [("mul", "waits", 1, 90), ("add", "too wide", 2, 40)]
    assert [edge[:2] for edge in graph["refused"]] == [[0, 2], [2, 3]]


def test_equal_layers_rewrites_and_near_misses_are_told_once(tmp_path) -> None:
    graph = written(small(), tmp_path / "page.html").data["graphs"][0]
    layers, other = graph["rewritten"]
    assert (layers["times"], layers["nodes_before"], layers["nodes_after"]) == (2, 2, 1)
    assert layers["modules"] == ["layers.0", "layers.1"]
    assert layers["lines"] == ["model.py:9  z"]
    assert layers["before"][1] == "o = torch.matmul(p, v)"  # of the first
    assert layers["after"] == ["a = sdpa(q)"]
    assert (other["times"], other["before"]) == (1, ["more"])
    (missed,) = graph["near_misses"]
    assert (missed["rule"], missed["times"]) == ("swiglu", 2)
    assert missed["reason"] == "silu is also read by mul"
    assert missed["lines"] == ["model.py:8  y", "model.py:9  z"]


def test_recompiles_and_graph_breaks_are_there(tmp_path) -> None:
    found = written(small(), tmp_path / "page.html").data
    (cut,) = found["breaks"]
    assert cut == {"times": 2, "reason": "print", "lines": ["model.py:4  print(x)"]}
    first, other = found["recompiles"]
    assert (first["change"], first["guard"], first["line"]) == (
        "x changed",
        "x == 2",
        "model.py:3  x",
    )
    assert (first["place"], other["place"]) == (0, None)  # of graph 7 nothing is known


def test_times_are_those_of_the_calls_and_sort_the_fallbacks(tmp_path) -> None:
    explanation, title = small(), "graph 0 inference"
    (graph,) = explanation.graphs
    cheap = aten("sort", "no kernel is declared for it", read=9999)
    graph = replace(graph, calls=(*graph.calls[:3], cheap))
    explanation = replace(explanation, graphs=(graph,))
    found = written(explanation, tmp_path / "page.html", {title: [4.0, 9.5, 2.0, 1.0]})
    (drawn,) = found.data["graphs"]
    assert drawn["measured"]
    assert [box["us"] for box in drawn["boxes"]] == [4.0, 9.5, 2.0, 1.0]
    assert [row["name"] for row in drawn["aten"]] == ["mm", "sort"]
    unmeasured = written(explanation, tmp_path / "page.html").data["graphs"][0]
    assert not unmeasured["measured"]
    assert [row["name"] for row in unmeasured["aten"]] == ["sort", "mm"]


def test_other_than_one_time_a_call_is_an_error_and_writes_nothing(tmp_path) -> None:
    with pytest.raises(ValueError, match="graph 0 inference: 1 times, where it has 4 calls"):
        small().to_html(tmp_path / "page.html", {"graph 0 inference": [1.0]})
    assert list(tmp_path.iterdir()) == []


def test_two_writes_are_equal(tmp_path) -> None:
    for name in ("a", "b"):
        small().to_html(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_no_text_can_end_its_element(tmp_path) -> None:
    found = written(hostile(), tmp_path / "page.html")
    assert found.text.count("<script") == 2
    assert "<img" not in found.text
    assert HOSTILE in found.texts


def test_the_scripts_make_no_markup_of_texts_and_the_page_asks_for_nothing() -> None:
    scripts = "".join(page._file(f"{name}.js") for name in page.SCRIPTS)
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", scripts
    )
    shell = page._file("page.html") + page._file("page.css")
    assert not re.findall(r"https?:|url\(|src=|href=|@import", scripts + shell)
    assert "default-src 'none'" in shell
    assert {p.stem for p in Path(page.__file__).parent.glob("*.js")} == set(page.SCRIPTS)


def test_a_graph_whose_calls_are_not_known_has_its_numbers(tmp_path) -> None:
    names = ("nodes", "fused", "aten_calls", "launches")
    counted = dict.fromkeys(names, 7)
    graph = GraphSummary(0, "inference", counted=counted, cache="came from the cache")
    found = written(Explanation("cached", "none", (graph,)), tmp_path / "page.html")
    (drawn,) = found.data["graphs"]
    assert (drawn["numbers"]["launches"], drawn["boxes"], drawn["lanes"]) == (7, [], [])
    assert drawn["notes"] == [["cache", "came from the cache"]]


def test_5000_nodes_are_written_within_two_seconds(tmp_path) -> None:
    explanation = large()
    assert len(explanation.graphs[0].nodes) == 5000
    facts = explanation.to_dict()
    assert processor_seconds(lambda: partial(page.write, facts, tmp_path / "page.html")) < 2
    assert (tmp_path / "page.html").stat().st_size < 3e6


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.norm(torch.nn.functional.gelu(self.up(x)))).softmax(-1)


def test_a_model_s_page_has_every_node_that_a_call_computes(tmp_path) -> None:
    found = gems_compile.explain(Mlp().to(DEVICE), rand(4, 8))
    drawn = written(found, tmp_path / "page.html").data["graphs"]
    assert [g["title"] for g in drawn] == ["graph 0 forward", "graph 0 backward"]
    for told, graph in zip(drawn, found.graphs, strict=True):
        assert len(told["boxes"]) == len(graph.calls)
        inside = {k for box in told["boxes"] for k in box["nodes"]}
        assert inside == {k for k, n in enumerate(graph.nodes) if n.steps}
        assert all(a < b for a, b in told["edges"])
    assert drawn[0]["edges"]


def reads(fn, *args) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Of each graph, each call's first op and the places of the calls that it reads."""
    graphs = gems_compile.explain(fn, *args).graphs
    return [[(c.ops[0], c.inputs) for c in g.calls] for g in graphs]


def test_a_call_reads_through_views_and_parts_of_tuples() -> None:
    def product(x, w):
        values, places = (x @ w).sort(-1)
        return values.t() @ values, places + 1

    (calls,) = reads(product, rand(6, 5), rand(5, 4))
    assert calls[:2] == [("mm", ()), ("sort", (0,))]
    assert sorted(calls[2:]) == [("add.Tensor", (1,)), ("mm", (1,))]


def test_a_call_reads_the_kernel_that_stores_its_part_of_an_op(tmp_path) -> None:
    """Of a norm's gradient dx comes from one kernel, and those of its weights from another."""
    x = rand(40, 64).requires_grad_()
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.LayerNorm(64)).to(DEVICE)
    found = gems_compile.explain(model, x).graphs[-1]
    products = [k for k, c in enumerate(found.calls) if c.name in ("mm", "addmm")]
    norm = [k for k, c in enumerate(found.calls) if "native_layer_norm_backward" in c.ops]
    assert found.kind == "backward" and len(products) == 2
    assert all(norm[0] in found.calls[k].inputs for k in products)
    assert any(products[k] in found.calls[j].inputs for k in (0, 1) for j in norm[1:])


def test_an_edge_s_bytes_are_those_of_its_value() -> None:
    def across(x):  # one number a row goes to a reduction over columns
        return x.sum(1, keepdim=True).exp().expand(300, 40).softmax(0)

    (graph,) = gems_compile.explain(across, rand(300, 40)).graphs
    assert {(e.nodes, e.bytes) for e in graph.unfused} == {(("exp", "_softmax"), 300 * 4)}


# where boxes stand --------------------------------------------------------------------------------


def test_a_layer_is_a_row_and_calls_without_a_module_go_along() -> None:
    lanes = layout.lanes_of(["emb", "layers.0.attn.q", "", "layers.0.mlp", "layers.1.mlp", "head"])
    told = [(lane.label, lane.boxes) for lane in lanes]
    assert told == [("emb", [0]), ("layers.0", [1, 2, 3]), ("layers.1", [4]), ("head", [5])]


def test_a_part_with_very_many_calls_is_taken_apart_by_its_next_number() -> None:
    modules = [f"stages.{s}.blocks.{b}.conv" for s in range(2) for b in range(3) for _ in range(20)]
    labels = [lane.label for lane in layout.lanes_of(modules)]
    assert labels == [f"stages.{s}.blocks.{b}" for s in range(2) for b in range(3)]
    assert len(layout.lanes_of(["all"] * 1000)) == 1


def test_no_two_boxes_overlap_and_a_reader_stands_right_of_what_it_reads_in_its_row() -> None:
    explanation = large(12, 20).to_dict()
    (graph,) = data.page_data(explanation)["graphs"]
    places = [
        (*box["at"][:2], box["at"][0] + layout.WIDTH, box["at"][1] + box["at"][2])
        for box in graph["boxes"]
    ]
    for k, a in enumerate(places):
        for b in places[:k]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for lane in graph["lanes"]:
        _, x, y, width, height = lane
        inside = [
            k for k, p in enumerate(places) if x <= p[0] < x + width and y <= p[1] < y + height
        ]
        edges = [(a, b) for a, b in graph["edges"] if a in inside and b in inside]
        assert all(places[a][2] < places[b][0] for a, b in edges)


def test_the_page_of_a_dump(tmp_path: Path, capsys: Any) -> None:
    """Of all graphs' reports, with the times that are known; none is said plainly."""
    from gems_compile.__main__ import main
    from gems_compile.page.of_dump import write_page

    folder = tmp_path / "dump"
    x = rand(8, 16).requires_grad_()
    with gems_compile.dump(folder):
        torch.compile(lambda x: torch.softmax(x * 2, -1).sum(), backend="gems")(x).backward()
    found = Page(write_page(folder)).data
    assert [g["title"] for g in found["graphs"]] == ["graph 0 forward", "graph 0 backward"]
    assert not any(graph["measured"] for graph in found["graphs"]) and found["name"] == "dump"
    report = json.loads((folder / "graph_00_forward" / "report.json").read_text())
    us = [None, *[3.5] * (len(report["calls"]) - 1)]
    (folder / "times.json").write_text(json.dumps({"graph_00_forward": us}))
    assert main(["page", str(folder), "--out", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.html")
    graphs = Page(tmp_path / "x.html").data["graphs"]
    assert [graph["measured"] for graph in graphs] == [True, False]
    assert main(["page", str(tmp_path)]) == 2
    assert "has no dump of a graph; GEMS_DUMP=" in capsys.readouterr().err
    (folder / "times.json").write_text("{")
    assert main(["page", str(folder)]) == 2
    assert "times.json cannot be read" in capsys.readouterr().err
    (folder / "times.json").unlink()  # as the process ends, it writes the page once more


def test_the_page_of_a_dump_has_recompiles_and_graph_breaks(tmp_path: Path) -> None:
    from gems_compile.page.of_dump import write_page

    def step(batch):
        h = batch.sin() * 2
        print("here")
        return h.cos() + 1

    torch._dynamo.reset()
    with gems_compile.dump(tmp_path):
        compiled = torch.compile(step, backend="gems")
        compiled(rand(4, 8))
        compiled(rand(6, 8))
    found = Page(write_page(tmp_path)).data
    (cut,) = found["breaks"]
    assert cut["times"] == 2 and cut["reason"].startswith("Failed to trace builtin operator")
    assert [line.partition("  ")[2] for line in cut["lines"]] == ['print("here")']
    again = [(r["change"], r["place"], r["graph"]) for r in found["recompiles"]]
    assert again == [
        ("size of batch, dim 0, changed 4 -> 6", 2, 2),
        ("size of h, dim 0, changed 4 -> 6", 3, 3),
    ]
    report = tmp_path / "graph_00_inference" / "report.json"
    told = json.loads(report.read_text())
    assert told["recompile"] is None and told["graph_breaks"][0]["reason"] == cut["reason"]
    del told["recompile"], told["graph_breaks"]  # as an earlier version wrote it
    report.write_text(json.dumps(told))
    assert Page(write_page(tmp_path)).data["breaks"][0]["times"] == 1
