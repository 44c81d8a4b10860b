"""`explain` and `GEMS_DUMP`: what is said about a compile is complete, right and usable."""

from __future__ import annotations

import io
import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BACKEND, DEVICE, gems_only, no_new_graph, rand
from torch import Tensor, nn

if BACKEND == "gems":
    import gems_compile
    from gems_compile import tables
    from gems_compile.backend import Gems
    from gems_compile.insight import dump_files as dump
    from gems_compile.insight.summary import ATEN, FREE, FUSED
    from gems_compile.lowering import pipeline

pytestmark = gems_only


@pytest.fixture(autouse=True)
def _wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        h = torch.nn.functional.gelu(self.up(x))
        return self.down(self.norm(h)).softmax(-1)


#: of float32, a GPU's fused attention is less exact, so that it is not taken
FUSED_ATTENTION = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def attention(q, k, v):
    scores = q @ k.transpose(-2, -1) * 0.5
    return scores.softmax(-1) @ v


def compile_into(folder: Path, fn, **kwargs):
    """fn compiled by a backend object of its own, dumped into ``folder``."""
    return torch.compile(fn, backend=Gems(), options={"dump": folder}, **kwargs)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# the dump ----------------------------------------------------------------------------------------

STAGES = ["aten", *(run.__name__ for run in pipeline.PASSES)] if BACKEND == "gems" else []
PASSES = [f"{k:02}_{name}.py" for k, name in enumerate(STAGES)]


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    """The dump of a training step of Mlp."""
    folder = tmp_path_factory.mktemp("dump")
    model = Mlp().to(DEVICE)
    compile_into(folder, model)(rand(4, 8)).square().sum().backward()
    torch._dynamo.reset()
    return folder


def test_a_graph_gets_every_file(training: Path) -> None:
    assert {p.name for p in training.iterdir()} == {"graph_00_forward", "graph_00_backward"}
    for graph in training.iterdir():
        found = files(graph)
        others = {"rewrites.txt", "plan.txt", "wrapper.py", "report.json", "options.json"}
        others |= {"references.py", "replay.py"}
        assert found >= {*PASSES, *others}
        kernels = {f for f in found if f.startswith("kernels/")}
        assert kernels, "no kernel was written"
        assert found - {*PASSES, *others} - kernels <= {"dynamo.txt"}
    assert "dynamo.txt" in files(training / "graph_00_forward")


def test_every_pass_file_runs_in_process(training: Path, capsys) -> None:
    """The results of each have the same shapes: no pass changes what a graph returns."""
    for graph in sorted(training.iterdir()):
        printed = set()
        for name in PASSES:
            runpy.run_path(str(graph / name), run_name="__main__")
            printed.add(capsys.readouterr().out)
        (only,) = printed
        assert only.startswith("result 0: float32[")


def test_a_pass_file_runs_by_itself(training: Path) -> None:
    path = training / "graph_00_forward" / PASSES[-1]
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "result 0: float32[4, 8]"


def test_a_pass_file_computes_what_the_program_does(tmp_path: Path) -> None:
    def fn(x, w):
        constant = torch.tensor([1.0, -2.0], device=x.device)
        return torch.relu(x @ w.t()).sum(1), x.flip(0)[:, ::2] + constant

    x, w = rand(3, 4), rand(5, 4)
    compile_into(tmp_path, fn)(x, w)
    for name in PASSES:
        forward = runpy.run_path(str(tmp_path / "graph_00_inference" / name))["forward"]
        for got, want in zip(forward(*_in_order(tmp_path, x, w)), fn(x, w), strict=True):
            torch.testing.assert_close(got, want)


def _in_order(folder: Path, *inputs):
    """AOTAutograd may order inputs anew: match them by shape."""
    made = runpy.run_path(str(folder / "graph_00_inference" / PASSES[0]))["make_inputs"]()
    return [next(t for t in inputs if t.shape == m.shape) for m in made]


def test_inputs_have_the_real_geometry(tmp_path: Path) -> None:
    base = rand(6, 10)
    x, y = base.t()[2:], rand(1, 6).expand(8, 6)
    flags = torch.ones(8, 6, dtype=torch.bool, device=DEVICE)
    index = torch.tensor([5, 2], device=DEVICE)

    def fn(x, y, flags, index):
        return torch.where(flags, x * y, 0.0)[index] + 1

    compile_into(tmp_path, fn)(x, y, flags, index)
    space = runpy.run_path(str(tmp_path / "graph_00_inference" / PASSES[0]))
    made = {(str(t.dtype), t.shape, t.stride(), t.storage_offset()) for t in space["make_inputs"]()}
    given = {(str(t.dtype), t.shape, t.stride(), t.storage_offset()) for t in (x, y, flags, index)}
    assert made == given
    assert space["forward"](*space["make_inputs"]())[0].shape == (2, 6)


def test_symbolic_sizes_have_their_example(tmp_path: Path) -> None:
    compile_into(tmp_path, lambda x: x.softmax(-1) + x.shape[0], dynamic=True)(rand(7, 5))
    path = tmp_path / "graph_00_inference" / PASSES[-1]
    assert " is 7 here; the program may call it with other sizes." in path.read_text()
    space = runpy.run_path(str(path))
    (result,) = space["forward"](*space["make_inputs"]())
    assert result.shape == (7, 5)


def test_a_nested_graph_runs(tmp_path: Path) -> None:
    def fn(p, x):
        return torch.cond(p, lambda x: x.sin() * 2, lambda x: x.cos() + 1, (x,)) + x

    compile_into(tmp_path, fn)(torch.tensor(True, device=DEVICE), rand(5, 3))
    space = runpy.run_path(str(tmp_path / "graph_00_inference" / PASSES[-1]))
    assert space["forward"](*space["make_inputs"]())[0].shape == (5, 3)


def test_an_op_of_the_users_own_is_named(tmp_path: Path) -> None:
    @torch.library.custom_op("dump_tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    compile_into(tmp_path, lambda x: double(x) + 1)(rand(12))
    path = tmp_path / "graph_00_inference" / PASSES[0]
    assert "It does not run by itself: torch.ops.dump_tests is a library" in path.read_text()
    with pytest.raises(SystemExit, match="library of the program's own"):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.gpu  # Dynamo does not trace a kernel that runs in the interpreter
def test_a_user_kernel_is_named(tmp_path: Path) -> None:
    from user_kernels import double_plus

    def fn(x, y):
        out = torch.empty_like(x)
        double_plus[(1,)](x, y, out, x.numel(), BLOCK=16)
        return out

    compile_into(tmp_path, fn)(rand(12), rand(12))
    path = tmp_path / "graph_00_inference" / PASSES[0]
    assert "It does not run by itself: triton_kernel_wrapper" in path.read_text()
    with pytest.raises(SystemExit, match="needs what the program holds"):
        runpy.run_path(str(path), run_name="__main__")


def test_kernels_hold_the_users_lines(training: Path) -> None:
    texts = [p.read_text() for p in (training / "graph_00_forward/kernels").iterdir()]
    gelu = next(t for t in texts if "activation.gelu" in t)
    line = next(row for row in gelu.splitlines() if "activation.gelu(" in row)
    assert "# test_explain.py:" in line
    assert "torch.nn.functional.gelu(self.up(x))" in line
    assert "launched 1 time a call" in gelu
    for text in texts:
        compile(text, "kernel", "exec")


def test_the_plan_is_in_order_with_reasons(training: Path) -> None:
    plan = (training / "graph_00_forward/plan.txt").read_text()
    places = [plan.index(text) for text in (" aten   addmm", " kernel fused_gelu", "softmax")]
    assert places == sorted(places)
    assert "because matrix products are left to the vendor's library" in plan
    assert "fuses gelu native_layer_norm" in plan
    assert "in norm" in plan


def test_the_report_is_json_that_adds_up(training: Path) -> None:
    for graph in training.iterdir():
        report = json.loads((graph / "report.json").read_text())
        numbers = report["numbers"]
        assert numbers["nodes"] == len(report["nodes"])
        assert numbers["fused"] + numbers["free"] + numbers["aten_calls"] == numbers["nodes"]
        assert numbers["launches"] == sum(c["kind"] == "kernel" for c in report["calls"]) > 0
        assert numbers["kernels"] == len(list((graph / "kernels").iterdir()))


def test_rewrites_are_told_with_line_and_module(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    class Inner(nn.Module):
        def forward(self, x):
            return attention(x, x, x)

    compile_into(tmp_path, Model())(rand(2, 4, 4, 8, dtype=FUSED_ATTENTION))
    graph = tmp_path / "graph_00_inference"
    text = (graph / "rewrites.txt").read_text()
    assert "attention: " in text
    assert "because the [L, S] scores are never written to memory" in text
    assert "return scores.softmax(-1) @ v" in text
    assert "in inner" in text
    assert "softmax" in (graph / "dynamo.txt").read_text()
    assert "scaled_dot_product" in (graph / "dynamo_rewritten.txt").read_text()


def test_a_later_process_takes_the_same_names(tmp_path: Path, monkeypatch) -> None:
    compile_into(tmp_path, lambda x: x.sin() + x.cos())(rand(3, 4))
    (tmp_path / "graph_00_inference/kernels/old.py").write_text("")
    compile_into(tmp_path, lambda x: x.sin() * x.cos())(rand(3, 4))
    assert {p.name for p in tmp_path.iterdir()} == {"graph_00_inference", "graph_01_inference"}
    monkeypatch.setattr(dump, "_numbers", {})
    monkeypatch.setattr(dump, "_taken", set())
    compile_into(tmp_path, lambda x: x.sin() - x.cos())(rand(3, 4))
    assert "sub" in (tmp_path / "graph_00_inference/plan.txt").read_text()
    assert not (tmp_path / "graph_00_inference/kernels/old.py").exists()


def test_a_dump_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    x = rand(3, 4)
    with caplog.at_level(logging.WARNING, "gems_compile"):
        got = compile_into(taken, lambda x: x.sin() + 1)(x)
    torch.testing.assert_close(got, x.sin() + 1)
    (told,) = [r for r in caplog.records if "dump" in r.getMessage()]
    assert str(taken) in told.getMessage()
    assert taken.read_text() == "a file"


def test_no_partial_file_is_left(training: Path) -> None:
    assert not [f for f in files(training) if f.endswith(".tmp")]


# explain -----------------------------------------------------------------------------------------


def test_a_module_for_inference() -> None:
    model, x = Mlp().to(DEVICE), rand(4, 8)
    with torch.no_grad():
        found = gems_compile.explain(model, x)
    (graph,) = found.graphs
    assert (graph.kind, graph.graph) == ("inference", 0)
    fates = {f: {n.op for n in graph.nodes if n.fate == f} for f in (ATEN, FUSED, FREE)}
    fused = {"gelu", "native_layer_norm", "_softmax"}
    assert fates == {ATEN: {"addmm"}, FUSED: fused, FREE: {"t"}}
    assert (graph.launches, graph.aten_calls, graph.failures) == (2, 2, ())
    text = str(found)
    assert "Mlp, compiled by gems" in text
    assert "addmm: matrix products are left to the vendor's library" in text
    assert "test_explain.py:" in text


def test_a_training_step_touches_nothing_of_the_users() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU()).to(DEVICE)
    x = rand(5, 4, grad=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    found = gems_compile.explain(model, x)
    assert [g.kind for g in found.graphs] == ["forward", "backward"]
    assert {g.graph for g in found.graphs} == {0}
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)


def test_why_finds_modules_ops_and_lines() -> None:
    found = gems_compile.explain(Mlp().to(DEVICE), rand(4, 8))
    (norm,) = [f for f in found.why("in norm") if "native_layer_norm " in f]
    assert norm.startswith("graph 0 forward: native_layer_norm (f32[4, 16], ")
    assert "fused in fused_gelu" in norm
    assert any("gelu_backward" in f and "graph 0 backward" in f for f in found.why("GELU(self.up"))
    assert all("addmm" in f for f in found.why("addmm"))
    assert len(found.why("addmm")) == 2
    assert found.why("no such thing") == []


def test_a_compiled_model_stays_compiled() -> None:
    model, x = Mlp().to(DEVICE), rand(4, 8)
    compiled = torch.compile(model, backend="gems")
    compiled(x).sum().backward()
    reports = len(gems_compile.reports())
    found = gems_compile.explain(compiled, x)
    assert [g.kind for g in found.graphs] == ["forward", "backward"]
    assert len(gems_compile.reports()) == reports
    with no_new_graph():
        compiled(x)


def test_a_second_call_with_other_sizes_is_static_too() -> None:
    def fn(x):
        return x.sin() + x.cos()

    for length in (5, 9):
        (graph,) = gems_compile.explain(fn, rand(3, length)).graphs
        assert {n.result for n in graph.nodes} == {f"f32[3, {length}]"}


def test_rewrites_and_near_misses() -> None:
    q = rand(2, 4, 8, 8, dtype=FUSED_ATTENTION)
    found = gems_compile.explain(attention, q, q + 1, q + 2)
    (rewritten,) = found.graphs[0].rewritten
    assert rewritten.rule == "attention"
    assert "attention, " in str(found)
    assert any("scores are never written" in f for f in found.why("attention"))

    def scores_too(q, k, v):
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return weights @ v, weights

    missed = gems_compile.explain(scores_too, q, q + 1, q + 2)
    assert missed.graphs[0].rewritten == ()
    assert "Nearly rewritten" in str(missed)
    assert any("is also returned" in f for f in missed.why("attention"))


def test_an_edge_that_is_not_fused_has_its_reason() -> None:
    def fn(x):
        return x.sin().sum(0), x.cos().sum(1).exp() + x.sum(1)

    found = gems_compile.explain(fn, rand(40, 33))
    edges = [e for g in found.graphs for e in g.unfused]
    calls = [c for g in found.graphs for c in g.calls]
    assert len(calls) > 1
    assert all(e.reason for e in edges)
    for edge in edges:
        assert edge.reason in " ".join(found.why(edge.producer))


def test_a_group_that_fails_is_told(monkeypatch) -> None:
    monkeypatch.setenv("GEMS_STRICT", "0")
    real = pipeline.source_for

    def fails_on_sine(group, *rest):
        if any(m.op == "sin" for m in group.members):
            raise ValueError("no sines today")
        return real(group, *rest)

    monkeypatch.setattr(pipeline, "source_for", fails_on_sine)
    found = gems_compile.explain(lambda x: (x.sin() + 1, (x.cos() * 2).softmax(-1)), rand(3, 4))
    (graph,) = found.graphs
    assert len(graph.failures) == 1
    assert "no sines today" in str(found)
    assert any("sin" in f and "runs as ATen: its kernel failed" in f for f in found.why("no sines"))


def test_graph_breaks_are_told() -> None:
    def fn(x):
        y = x.sin() + 1
        torch._dynamo.graph_break()
        return y.cos() * 2

    found = gems_compile.explain(fn, rand(3, 4))
    assert [g.graph for g in found.graphs] == [0, 1]
    assert "Graph breaks" in str(found)


def test_nothing_to_compile() -> None:
    assert "found no graph" in str(gems_compile.explain(lambda: 3))


def test_json_is_the_whole_of_it() -> None:
    found = gems_compile.explain(Mlp().to(DEVICE), rand(4, 8))
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.to_dict()))
    assert [g["kind"] for g in data["graphs"]] == ["forward", "backward"]
    assert data["graphs"][0]["nodes"][0].keys() == {
        "name",
        "op",
        "result",
        "fate",
        "detail",
        "line",
        "module",
        "inputs",
        "steps",
    }
    assert data["seconds"].keys() == {"Dynamo", "AOTAutograd"}


# tables ------------------------------------------------------------------------------------------


TABLE = [(1, "short\nbelow"), (10, "word " * 20 + "\n" + "code" * 20)]


def test_a_table_aligns_and_breaks() -> None:
    assert tables.Table("Title", ("n", "what"), TABLE).text(60) == "\n".join(
        [
            "Title",
            "   n  what",
            "   1  short",
            "        below",
            "  10  " + " ".join(["word"] * 11),
            "        " + " ".join(["word"] * 9),
            "        " + "code" * 12 + "c...",
        ]
    )


def test_rich_shows_the_same_lines() -> None:
    console = pytest.importorskip("rich.console").Console(width=60, file=io.StringIO())
    table = tables.Table("Title [x]", ("n", "what [b]"), TABLE)
    console.print(table)
    assert console.file.getvalue() == table.text(60) + "\n"
    console.print(gems_compile.explain(lambda x: x.sin() + 1, rand(3)))
    assert "compiled by gems" in console.file.getvalue()


def test_a_buffer_that_repeats_its_elements_is_put_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", rand(1).expand(4))
            self.register_buffer("seen", torch.zeros(4, device=DEVICE))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return x * self.scale + self.seen

    model = Model()
    before = model.scale.clone()
    gems_compile.explain(model, rand(3, 4))  # ATen would refuse to write the buffer
    assert torch.equal(model.scale, before) and model.seen.eq(0).all()


def test_what_a_step_moves() -> None:
    """Bytes, and those of eager PyTorch's ops for the same; a recomputed sum counts once."""

    def program(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = x + y.float()
        return z.exp() * 2, torch.softmax(z, -1)

    x, y = rand(64, 32), rand(32).to(torch.bfloat16)
    (graph,) = gems_compile.explain(program, x, y).graphs
    moved = sum(c.read + c.written for c in graph.calls)
    whole, row = 64 * 32 * 4, 32 * 4
    eager = (row // 2 + row) + (whole + row + whole) + 3 * 2 * whole  # cast, add; exp, mul, softmax
    assert sum(c.eager for c in graph.calls) == eager
    assert sum(c.saved for c in graph.calls) == eager - moved
    assert moved <= 4 * whole + 2 * row


def test_edges_and_steps() -> None:
    found = gems_compile.explain(Mlp().to(DEVICE), rand(4, 8))
    for graph in found.graphs:
        known = {*graph.inputs, *(node.name for node in graph.nodes)}
        assert set(graph.outputs) <= known
        for node in graph.nodes:
            assert set(node.inputs) <= known
            assert bool(node.steps) == (node.fate != FREE)
            for place in node.steps:
                call = graph.calls[place]
                assert node.op in call.ops or node.detail.endswith("which recompute it")
        keys = {f"{c.name}_{c.detail}" for c in graph.calls if c.kind == "kernel"}
        assert keys == set(graph.sources)
