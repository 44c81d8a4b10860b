"""TORCH_LOGS, TORCH_TRACE, and why a function was compiled again or cut: in the user's words."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BACKEND, gems_only, rand

if BACKEND == "gems":
    import gems_compile
    from gems_compile import dynamo
    from gems_compile.backend import Gems
    from gems_compile.dynamo import Breaks, Watch, in_words
    from gems_compile.explain import Explanation
    from gems_compile.insight import logs
    from gems_compile.lowering import private
    from gems_compile.lowering.report import Report
    from gems_compile.lowering.source import Source

pytestmark = gems_only


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def messages(caplog, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def here(text: str) -> str:
    """``test_logs.py:12  code`` of the line of this file that ends with ``text``."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [k for k, line in enumerate(lines, 1) if line.endswith(text)]
    return f"test_logs.py:{number}  {lines[number - 1].strip()}"


# logs --------------------------------------------------------------------------------------------


def test_every_logger_is_below_the_packages() -> None:
    ours = [n for n in logging.root.manager.loggerDict if n.split(".")[0] in PACKAGES]
    assert ours
    assert all(name == "gems_compile" or name.startswith("gems_compile.") for name in ours)


PACKAGES = ("gems_compile", "lowering", "kernels")


def test_a_graph_is_a_line_at_info(caplog) -> None:
    with caplog.at_level(logging.INFO, "gems_compile"):
        torch.compile(lambda x: (x @ x).softmax(-1), backend=Gems())(rand(4, 4))
    (line,) = [m for m in messages(caplog) if m.startswith("graph ")]
    assert line.startswith("graph 0_inference: 2 nodes -> 1 launches, 1 ATen calls, 0.")
    assert " s, cache: " in line
    assert messages(caplog, logging.DEBUG) == []


def test_a_training_step_is_two_lines(caplog) -> None:
    with caplog.at_level(logging.INFO, "gems_compile"):
        fn = torch.compile(lambda x: x.sin().softmax(-1), backend=Gems())
        fn(rand(4, 4, grad=True)).sum().backward()
    kinds = [m.split(":")[0] for m in messages(caplog) if " nodes -> " in m]
    assert kinds == ["graph 0_forward", "graph 0_backward"]


def test_decisions_are_at_debug(caplog) -> None:
    def fn(q, k):
        scores = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return scores @ k, scores  # the scores are a result

    with caplog.at_level(logging.DEBUG, "gems_compile"):
        q = rand(2, 4, 8, 8)
        torch.compile(fn, backend=Gems())(q, q + 1)
    told = [m.removeprefix("graph 0_inference: ") for m in messages(caplog, logging.DEBUG)]
    assert any(m.startswith("nearly rewritten x1: attention at ") for m in told)
    product = next(m for m in told if m.startswith("runs as ATen x"))
    assert "because matrix products are left to the vendor's library" in product
    assert "test_logs.py:" in product
    assert any(m.startswith("seconds: passes 0.") for m in told)
    assert any(m.startswith("graph 0_inference runs; seconds: ") and "triton" in m for m in told)


def test_without_logs_nothing_is_summarized(monkeypatch, caplog) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("somebody asked")

    monkeypatch.setattr(logs, "in_a_line", fails)
    monkeypatch.setattr(logs, "in_detail", fails)
    monkeypatch.setattr(logs, "artifacts", fails)
    torch.compile(lambda x: x.sin() + 1, backend=Gems())(rand(4, 4))
    assert messages(caplog, logging.WARNING) == []


def test_what_cannot_be_told_stops_no_compile(monkeypatch, caplog) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no words")

    monkeypatch.setattr(logs, "in_a_line", fails)
    x = rand(4, 4)
    with caplog.at_level(logging.INFO, "gems_compile"):
        got = torch.compile(lambda x: x.sin() + 1, backend=Gems())(x)
    torch.testing.assert_close(got, x.sin() + 1)
    assert messages(caplog, logging.WARNING) == [
        "graph 0_inference is not told of: ValueError: no words"
    ]


PROGRAM = """
import torch

def fn(x):
    return (x @ x).softmax(-1) * 2

torch.compile(fn, backend="gems")(torch.ones(4, 4))
"""


#: a rewrite, a graph break, and a recompile with a gradient
LAYERS = """
import torch

def attention(x):
    scores = x @ x.transpose(-2, -1) * 0.5
    return scores.softmax(-1) @ x

def fn(x):
    y = attention(x).exp() + 1
    print("here")
    return y.sin() * 2

compiled = torch.compile(fn, backend="gems")
compiled(torch.ones(2, 4, 8, 8))
compiled(torch.ones(2, 4, 6, 8, requires_grad=True)).sum().backward()
"""


def run_program(
    folder: Path, program: str = PROGRAM, **variables: str
) -> subprocess.CompletedProcess[str]:
    script = folder / "program.py"
    script.write_text(program)
    env = {k: v for k, v in os.environ.items() if not k.startswith("GEMS_")}
    env |= {"TRITON_INTERPRET": "1", "GEMS_CACHE": "0", **variables}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_torch_logs_and_torch_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = run_program(tmp_path, TORCH_LOGS="+gems_compile", TORCH_TRACE=str(trace))
    assert "] graph 0_inference: 3 nodes -> 1 launches, 1 ATen calls, " in done.stderr
    assert "runs as ATen x1: mm, because matrix products" in done.stderr
    assert "program.py:5  return (x @ x).softmax(-1) * 2" in done.stderr
    (log,) = trace.iterdir()
    found = artifacts_of(log.read_text())
    kernel = next(name for name in found if name.startswith("gems_0_inference_kernel_fused"))
    assert found.keys() - {kernel} == {
        f"gems_0_inference_{what}" for what in ("plan", "rewrites", "report")
    }
    assert "graph 0 inference: 3 nodes -> 1 launches" in found["gems_0_inference_plan"]
    assert json.loads(found["gems_0_inference_report"])["kind"] == "inference"
    assert "@triton.jit" in found[kernel]


def test_a_graph_from_the_cache_is_told_of_by_its_counts() -> None:
    report = Report("3_inference", nodes=7, launches=2, aten_calls=1, cache="from the cache")
    report.graph, report.kind = 3, "inference"
    line = "graph 3_inference: 7 nodes -> 2 launches, 1 ATen calls, 0.00 s, cache: from the cache"
    assert logs.in_a_line(report) == line
    source = Source("fused_sin", "# the kernel's text", [], 1)
    report.sources = [source]
    texts = {name: text for name, _, text in logs.artifacts(report)}
    plan = texts["gems_3_inference_plan"]
    assert "graph 3 inference: 7 nodes -> 2 launches" in plan
    assert "The cache of whole graphs has counts alone" in plan and "need no call" not in plan
    kernel = texts[f"gems_3_inference_kernel_fused_sin_{source.key[:8]}"]
    assert kernel == "# the kernel's text"
    assert json.loads(texts["gems_3_inference_report"])["numbers"]["launches"] == 2
    assert list(logs.in_detail(report)) == ["seconds: "]


def artifacts_of(log: str) -> dict[str, str]:
    """Name -> payload of ours: a payload is the lines behind its record that begin with a tab."""
    found: dict[str, str] = {}
    name = ""
    for line in log.splitlines():
        if line.startswith("\t"):
            found[name] = f"{found.get(name, '')}{line[1:]}\n"
            continue
        record = json.loads(line[line.index("{") :])
        name = record.get("artifact", {}).get("name", "")
    return {name: text for name, text in found.items() if name.startswith("gems_")}


def test_tlparse_shows_our_artifacts(tmp_path: Path) -> None:
    tlparse = shutil.which("tlparse")
    if tlparse is None:
        pytest.skip("no tlparse on the PATH (pip install tlparse)")
    run_program(tmp_path, LAYERS, TORCH_TRACE=str(tmp_path / "trace"))
    (log,) = (tmp_path / "trace").iterdir()
    out = tmp_path / "out"
    subprocess.run([tlparse, log, "-o", out, "--no-browser"], check=True, capture_output=True)
    index = (out / "index.html").read_text()
    found: dict[str, str] = {}
    for path in out.glob("*/gems_*"):
        assert f'href="{path.relative_to(out)}"' in index
        found[re.sub(r"_\d+$", "", path.stem)] = path.read_text()  # tlparse counts its files
    labels = ("0_inference", "1_inference", "2_forward", "2_backward", "3_forward", "3_backward")
    whats = ("plan", "rewrites", "report")
    assert found.keys() >= {f"gems_{label}_{what}" for label in labels for what in whats}
    assert "graph 0 inference: " in found["gems_0_inference_plan"]
    rewrites = found["gems_2_forward_rewrites"]
    assert "attention: " in rewrites and "return scores.softmax(-1) @ x" in rewrites
    assert "before:" in rewrites and "scores.softmax(-1)  # f32[2, 4, " in rewrites
    (told,) = json.loads(found["gems_0_inference_report"])["rewritten"]
    assert len(told["before"]) == told["nodes_before"]
    kernels = {name: text for name, text in found.items() if "_kernel_fused_" in name}
    assert {name.split("_kernel_")[0].removeprefix("gems_") for name in kernels} >= {*labels}
    assert all("@triton.jit" in text for text in kernels.values())
    assert "# program.py:" in "".join(kernels.values())


def test_torch_logs_at_info_is_short(tmp_path: Path) -> None:
    told = run_program(tmp_path, TORCH_LOGS="gems_compile").stderr.splitlines()
    assert len(told) == 1
    assert "graph 0_inference: " in told[0]


# recompiles --------------------------------------------------------------------------------------


def again(fn, *calls, **kwargs):
    """What is told of the recompiles of these calls."""
    backend = Gems()
    compiled = torch.compile(fn, backend=backend, **kwargs)
    for args in calls:
        compiled(*args)
    return backend.recompiles


def test_a_size_that_changed(caplog) -> None:
    def fn(batch):  # a size
        return batch.sin() * 2

    with caplog.at_level(logging.INFO, "gems_compile"):
        (found,) = again(fn, [rand(4, 8)], [rand(4, 16)], [rand(4, 32)])  # the third is dynamic
    assert (found.graph, found.function) == (1, "fn")
    assert found.change == "size of batch, dim 1, changed 8 -> 16"
    assert "dynamic=True" in found.hint and "mark_dynamic(batch, 1)" in found.hint
    assert found.line == here("def fn(batch):  # a size")
    assert found.guard == "tensor 'batch' size mismatch at index 1. expected 8, actual 16"
    (told,) = [m for m in messages(caplog) if "compiled again" in m]
    assert told == f"graph 1: {found}  {found.line}"


def test_dynamic_sizes_compile_once() -> None:
    assert again(lambda x: x.sin() * 2, [rand(4, 8)], [rand(4, 16)], dynamic=True) == []


def test_what_else_changes() -> None:
    x = rand(4, 8)
    changes = [r.change for r in again(lambda x: x.sin() * 2, [x], [x.double()], [x[0]])]
    assert changes[0] == "dtype of x changed Float -> Double"
    assert changes[1] in ("x had 2 dims and has 1", "dtype of x changed Double -> Float")
    (gradient,) = again(lambda x: x.sin() * 2, [x], [rand(4, 8, grad=True)])
    assert gradient.change == "x requires grad now"
    (stride,) = again(lambda x: x.sin() * 2, [rand(8, 8)], [rand(8, 8).t()])
    assert stride.change.startswith("stride of x, dim 0, changed 8 -> 1")


def test_a_python_number_has_the_line_that_reads_it() -> None:
    def fn(x, factor):
        y = x.sin()
        return y * factor  # a number

    (found,) = again(fn, [rand(4), 2.0], [rand(4), 3.0])
    assert found.change == "factor is no longer 2.0"
    assert found.line == here("return y * factor  # a number")


def test_a_module_of_torchs_has_arguments_without_names() -> None:
    model = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Softmax(-1))
    (found,) = again(model, [rand(4, 8)], [rand(5, 8)])
    assert found.function == "a module of torch's"
    assert found.line == ""
    assert found.change == "size of argument 0, dim 0, changed 4 -> 5"
    assert "mark_dynamic(tensor, 0)" in found.hint


def test_a_method_has_its_class() -> None:
    class Model(torch.nn.Module):
        def forward(self, x):  # a method
            return x.sin() * 2

    (found,) = again(Model(), [rand(4, 8)], [rand(5, 8)])
    assert found.function in ("Model.forward", "forward")  # Python 3.10 knows no class
    assert found.line == here("def forward(self, x):  # a method")


def test_grad_mode_is_a_setting() -> None:
    backend = Gems()
    compiled = torch.compile(lambda x: x.sin() * 2, backend=backend)
    compiled(rand(4))
    with torch.no_grad():
        compiled(rand(4))
    (found,) = backend.recompiles
    assert found.change == "a global setting changed: grad_mode"


def test_all_versions_are_told_and_a_reset_forgets() -> None:
    def fn(x):
        return x.sin() * 2

    x = rand(4, 8)
    backend = Gems()
    compiled = torch.compile(fn, backend=backend)
    for arg in (x, x.double(), x.half()):
        compiled(arg)
    assert [len(r.older) for r in backend.recompiles] == [0, 1]
    assert [r.compile_id for r in backend.recompiles] == ["0/1", "0/2"]
    (older,) = backend.recompiles[1].older
    assert older.startswith("tensor 'x' dtype mismatch") and "\n" not in older
    torch._dynamo.reset()
    assert backend.recompiles == []
    for arg in (x, x.double()):
        compiled(arg)
    (found,) = backend.recompiles
    assert found.change == "dtype of x changed Float -> Double"


GUARDS = {
    "tensor 'L['x']' size mismatch at index 0. expected 4, actual 6": "size of x, dim 0, changed 4",
    "tensor 'self._buffers['c']' stride mismatch at index 1. expected 1, actual 8": "stride of",
    "2 <= x.size()[0] <= 5": "2 <= x.size()[0] <= 5 no longer holds",
    "y.size()[0] == x.size()[0]": "y.size()[0] == x.size()[0] no longer holds",
    "L['self']._modules['drop'].training == True": "self.drop evaluates now",
    "L['x'] is L['xs'][0]": "two arguments are one tensor now, or no longer are",
    "L['k'] is None": "k is no longer None",
    "len(xs) == 3": "the length of xs is no longer 3",
    "L['n'] == 3": "n is no longer 3",
    "___check_obj_id(L['fn'], 1405)": "fn is another object, or of another type",
    "GLOBAL_STATE changed: autocast ": "a global setting changed: autocast",
    "Duplicate tensor found where not expected! x": "two arguments are one tensor now",
    "Cache line invalidated because L['m'] got deallocated": "what the graph was compiled for is",
    "BACKEND_MATCH failure: torch.compile detected": "the function was compiled with another",
    "tensor 'x' dispatch key set mismatch. expected A, actual B": "x is another kind of tensor: A",
    "something that nobody knows": "this no longer holds: something that nobody knows",
}


@pytest.mark.parametrize("guard", GUARDS)
def test_guards_in_words(guard: str) -> None:
    change, hint = in_words(guard)
    assert change.startswith(GUARDS[guard])
    assert hint


def test_a_torch_without_these_facts_tells_nothing(monkeypatch) -> None:
    monkeypatch.delattr(torch._dynamo.utils, "guard_failures")
    monkeypatch.delattr(torch._dynamo.utils, "graph_break_reasons")
    assert private.recompiled() is None
    assert private.graph_breaks() == []
    with monkeypatch.context() as patch:
        patch.delattr(torch._dynamo.utils, "get_metrics_context")
        assert private.seconds_of_dynamo() is None
    assert again(lambda x: x.sin() * 2, [rand(4, 8)], [rand(4, 16)]) == []


# graph breaks ------------------------------------------------------------------------------------


def cut(x):
    y = x.sin() * 2
    print("here")  # a break
    if y.sum() > 100:  # another
        y = y + 1
    return y.cos() + 1


def test_breaks_have_their_lines(caplog) -> None:
    with caplog.at_level(logging.INFO, "gems_compile"):
        found = gems_compile.explain(cut, rand(4, 8))
    lines = {why.split("\n")[0]: lines for why, lines in found.break_lines.items()}
    assert lines["Failed to trace builtin operator"] == (here('print("here")  # a break'),)
    (why,) = [why for why in lines if why.startswith("Data-dependent branching")]
    assert lines[why] == (here("if y.sum() > 100:  # another"),)
    assert found.breaks.keys() == found.break_lines.keys()
    text = str(found)
    assert "Graph breaks: Dynamo cut the program here" in text
    assert here("if y.sum() > 100:  # another") in text
    data = found.to_dict()
    assert data["graph_break_lines"].keys() == data["graph_breaks"].keys()
    assert any(here("if y.sum() > 100:  # another") in fact for fact in found.why("branching"))
    told = [m for m in messages(caplog) if m.startswith("graph break: ")]
    assert any(m.endswith(here("if y.sum() > 100:  # another")) for m in told)


def test_breaks_before_a_reset_are_kept() -> None:
    breaks = Breaks()
    torch.compile(cut, backend=Gems())(rand(4, 8))
    breaks.look()
    torch._dynamo.reset()
    torch.compile(cut, backend=Gems())(rand(4, 8))
    breaks.look()
    lines = [line for _, line in breaks.found]
    assert lines.count(here('print("here")  # a break')) == 2


def test_recompiles_are_explained() -> None:
    def fn(x):  # explained
        return x.sin() * 2

    backend, watch = Gems(), Watch()
    compiled = torch.compile(fn, backend=backend)
    with watch:
        compiled(rand(4, 8))
        compiled(rand(4, 16))
    found = Explanation.of(backend, "fn", watch)
    (told,) = found.to_dict()["recompiles"]
    assert told["change"] == "size of x, dim 1, changed 8 -> 16"
    assert told["line"] == here("def fn(x):  # explained")
    text = " ".join(str(found).split())
    assert "Compiled again: the program had changed" in text
    assert "fn was compiled again: size of x, dim 1, changed 8 -> 16" in text
    assert any("mark_dynamic(x, 1)" in fact for fact in found.why("dim 1"))


def test_a_function_that_dynamo_gave_up_is_counted() -> None:
    backend, watch = Gems(), Watch()
    compiled = torch.compile(lambda x: x.sin() * 2, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=2), watch:
        for dtype in (torch.float32, torch.float64, torch.float16):
            compiled(rand(4).to(dtype))
    assert watch.gave_up == 1
    assert "1 function had been compiled too often" in str(Explanation.of(backend, "fn", watch))


def test_resumed_functions_have_the_users_name() -> None:
    code = test_dynamic_sizes_compile_once.__code__
    resumed = code.replace(co_name="torch_dynamo_resume_in_step_at_12")
    assert dynamo._function(resumed) == "step, behind line 12,"
    assert dynamo._function(code) == "test_dynamic_sizes_compile_once"
