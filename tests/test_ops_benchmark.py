"""The benchmark of eager mode's ops: its cases, what it calls wrong, its rows, its table."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from eagercheck import nothing_left  # noqa: F401
from helpers import DEVICE
from opcheck import SEED

from gems_compile import eager
from gems_compile.calls import one_op, varying
from gems_compile.calls.worth import Measured, path_of, read_table

ops = pytest.importorskip("benchmarks.ops", reason="the benchmarks are not installed")
op_cases = pytest.importorskip("benchmarks.op_cases")
op_timing = pytest.importorskip("benchmarks.op_timing")
op_defaults = pytest.importorskip("benchmarks.op_defaults")

CASES = op_cases.cases(small=True)
SETTING = op_timing.Setting("kernel", "float32", DEVICE, seconds=0.0, small=True)
COPIES = op_timing.Copies(SETTING)
FOLDER = Path(ops.__file__).parent


@pytest.fixture(autouse=True)
def quickly(monkeypatch: Any) -> None:
    """One call tells as much as a thousand where time is none of the question."""
    monkeypatch.setattr(op_timing.timing, "MIN_STEPS", 1)
    monkeypatch.setattr(op_timing.timing, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(op_timing.timing, "BATCH_SECONDS", 0.0)
    monkeypatch.setattr(op_timing, "TURNS", 1)


# cases -------------------------------------------------------------------------------------------


def test_nearly_every_op_is_timed() -> None:
    assert len(op_cases.without_cases()) < len(eager._declared()) / 20
    assert {case.family for case in CASES.values()} == set(op_cases.FAMILIES)
    full = op_cases.cases()
    small = {case.overload for case in CASES.values()}
    others = {case.overload for case in full.values()} - small
    assert small <= {case.overload for case in full.values()}
    assert all("_scaled_dot_product_" in name for name in others)  # a CPU has none of them
    assert full["add.Tensor-2^24"].elements() == 2**24 and "add.Tensor-16384" in full
    assert {"sum.dim_IntList-8192x4096", "sum.dim_IntList-8192x4096-columns"} <= set(full)


#: which ATen has no kernel for there, or takes another device's
REFUSED = {
    "cpu": ("_fused_rms_norm_backward", "_masked_scale", "_conv_depthwise2d"),
    "cuda": ("_batch_norm_no_update",),
}[DEVICE]


def test_every_case_is_a_call_that_aten_takes() -> None:
    for name, case in CASES.items():
        if case.op in REFUSED:
            continue
        try:
            assert op_timing.tensors(op_timing.Measured(case, SETTING)()), name
        except Exception as error:
            pytest.fail(f"{name}: {error}")


@pytest.mark.parametrize("family", op_cases.FAMILIES)
def test_our_numbers_are_right(family: str) -> None:
    """Of two cases of each family, others every day; some calls are ATen's."""
    those = [c for c in CASES.values() if c.family == family and c.op not in REFUSED]
    for case in random.Random(SEED).sample(those, 2):
        status, moved = op_timing.Measured(case, SETTING).check()
        assert moved > 0
        assert not status.startswith("wrong"), f"{case.name}: {status}"


def test_a_call_is_the_same_every_time() -> None:
    case = CASES["gather-6x34"]
    for a, b in zip(*(op_timing.Measured(case, SETTING).args for _ in range(2)), strict=True):
        assert a is b or a == b if not isinstance(a, torch.Tensor) else torch.equal(a, b)


def test_cases_by_name() -> None:
    chosen = lambda text: [case.name for case in op_cases.chosen(text, True)]  # noqa: E731
    assert chosen("gelu") == ["gelu-130", "gelu-34"]
    assert chosen("gelu-34, mv") == ["gelu-34", "mv-6x34"]
    assert {"addmv-6x34", "dot-130", "mv-6x34", "vdot-130"} <= set(chosen("product"))
    assert "gelu-34" not in chosen("product")
    assert len(chosen("")) == len(CASES)


# what is wrong -----------------------------------------------------------------------------------


def test_what_is_wrong() -> None:
    why = op_timing.why_wrong
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    a = exact.float()
    assert why(a, a, exact) is None
    assert why(a + 2e-7, a, exact) is None
    assert "from float64" in why(a + 2e-6, a, exact)
    assert "is torch.float16 [100]" in why(a.half(), a, exact)
    assert "[99]" in why(a[1:], a, exact)
    special = a.clone()
    special[3], special[4] = float("nan"), float("inf")
    assert why(special, special, special.double()) is None
    assert "infinities" in why(a, special, special.double())
    assert "infinities" in why(special, a, exact)
    assert "infinities" in why(-special, special, special.double())
    n = torch.arange(4)
    assert why([n], [n], [n]) is None
    assert "other values" in why([n + 1], [n], [n])


def test_what_is_unlikely() -> None:
    torch.manual_seed(0)
    why = op_timing.why_unlikely
    a, b = torch.rand(1000), torch.rand(1000)
    assert why(a, b) is None
    assert "has the mean" in why(a + 0.2, b)
    assert "[500]" in why(a[:500], b)


# rows --------------------------------------------------------------------------------------------


def test_a_row() -> None:
    row = op_timing.measure(CASES["gelu-34"], SETTING, COPIES)
    assert row["status"] == "ok"
    assert row["ratio"] == row["eager_us"] / row["gems_us"] > 0
    assert row["gbps"] == pytest.approx(2 * 4 * 34 / row["gems_us"] / 1e3)
    assert row["of_copy"] > 0 and (row["elements"], row["columns"]) == (34, 34)
    assert row["how"] == ("wall" if DEVICE == "cpu" else "graph")


@pytest.mark.parametrize("mode", ["host", "call"])
def test_other_modes(mode: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(op_timing, "BATCHES", 1)
    monkeypatch.setattr(op_timing, "BATCH", 2)
    setting = dataclasses.replace(SETTING, mode=mode)
    row = op_timing.measure(CASES["gelu-34"], setting, COPIES)
    assert row["status"] == "ok" and row["gems_us"] > 0
    assert ("gbps" in row) == (mode == "call")
    assert op_timing.host_us(lambda: None, torch.device(DEVICE), 0.0) > 0


def test_a_call_of_atens_has_no_times(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        one_op, "compile_one", lambda *_: varying.Variant(None, False, "no such luck")
    )
    row = op_timing.measure(CASES["gelu-34"], SETTING, COPIES)
    assert row["status"] == "ATen's: no such luck" and "ratio" not in row


def test_wrong_numbers_are_not_timed(monkeypatch: Any) -> None:
    def wrong(*_: Any) -> varying.Variant:
        layout = one_op.layout_of(torch.empty(34))
        return varying.Variant(lambda given: [given[0] * 2], True, "", [layout])

    monkeypatch.setattr(one_op, "compile_one", wrong)
    row = op_timing.measure(CASES["gelu-34"], SETTING, COPIES)
    assert row["status"].startswith("wrong: result 0 is") and "ratio" not in row


def test_a_failing_call_is_a_row() -> None:
    case = dataclasses.replace(CASES["gelu-34"], call=op_cases.call(op_cases.T(4), "nonsense"))
    row = op_timing.measure(case, SETTING, COPIES)
    assert row["status"].startswith("failed: RuntimeError")


# the command -------------------------------------------------------------------------------------


def run(*argv: str) -> int:
    return ops.main(["--small", "--seconds", "0", "--dtype", "float32", *argv])


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    found, plot, sink = (tmp_path / name for name in ("rows.json", "ops.svg", "ops.jsonl"))
    outputs = ("--json", str(found), "--plot", str(plot), "--results", str(sink))
    assert run("--ops", "gelu,mv", "--no-flag-gems", *outputs) == 0
    rows = json.loads(found.read_text())
    assert [row["case"] for row in rows] == ["gelu-130", "gelu-34", "mv-6x34"]
    assert {"gpu", "target", "torch", "commit", "date"} <= set(rows[0])
    assert [json.loads(line) for line in sink.read_text().splitlines()] == rows
    text = capsys.readouterr().out
    assert "pointwise, geometric mean (cases): " in text and "x eager (2)" in text
    assert plot.exists() or "matplotlib is not installed" in text
    if plot.exists():
        assert all(row["case"] in plot.read_text() for row in rows)


def test_parts(tmp_path: Path, capsys: Any) -> None:
    """Each of two processes measures half, in both modes; a third reads what they wrote."""
    files = []
    for mode in ("kernel", "call"):
        for k in (1, 2):
            files.append(tmp_path / f"{mode}{k}.json")
            half = ("--part", f"{k}/2", "--json", str(files[-1]), "--mode", mode)
            assert run("--ops", "gelu,mv", "--no-flag-gems", *half) == 0
    sizes = [len(json.loads(file.read_text())) for file in files]
    assert sizes == [2, 1, 2, 1]
    lines = [json.dumps(row) + "\n" for row in json.loads(files[0].read_text())]
    files[0].write_text("".join(lines))  # as a run that was cut leaves it
    out = tmp_path / "all.json"
    capsys.readouterr()
    again = ("--rows", *map(str, files), "--mode", "call", "--json", str(out))
    assert run("--ops", "gelu,mv", *again) == 0
    rows = json.loads(out.read_text())
    assert [row["case"] for row in rows] == ["gelu-130", "gelu-34", "mv-6x34"]
    assert all(row["mode"] == "call" and row["kernel_ratio"] > 0 for row in rows)
    assert "x eager (2)" in capsys.readouterr().out
    assert run("--rows", *map(str, files), "--mode", "host") == 2
    assert "--rows: no row of mode host there" in capsys.readouterr().err


def test_kernels_for_any_sizes(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(varying, "OWN_SIZES", 4)  # which the command changes
    monkeypatch.setattr(varying, "AT_ONCE", "all")
    found = tmp_path / "rows.json"
    which = "--any-sizes", "first", "--no-flag-gems", "--json", str(found)
    assert run("--ops", "gelu-34", *which) == 0
    (row,) = json.loads(found.read_text())
    assert (row["any_sizes"], row["shared"], row["status"]) == ("first", True, "ok")
    (handler,) = (h for h in eager._state.handlers.values() if h.name == "gelu")
    assert [v.shared for v in handler.variants.values()] == [True]
    with pytest.raises(SystemExit):
        run("--any-sizes", "--mode", "call", "--write-table")
    assert "--write-table with --any-sizes takes --mode kernel, not call" in capsys.readouterr().err


def test_a_table_of_kernels_for_any_sizes(tmp_path: Path) -> None:
    """The slowest of the calls that are ours; what is not there, or takes no other sizes, stays."""
    table = {
        "target": "nvidia:sm90", "measured": "a GPU", "how": "so",
        "ops": {
            "gelu": {"least": 1000, "ratios": {"4": 0.5}},
            "add.Tensor": {"least": None},
            "mul.Tensor": {"least": 0},
        },
    }  # fmt: skip
    path = tmp_path / "nvidia-sm90.json"
    path.write_text(json.dumps(table))

    def row(op: str, elements: int, ratio: float, shared: bool = True) -> dict[str, Any]:
        facts = {"op": op, "elements": elements, "ratio": ratio, "shared": shared}
        return {**facts, "status": "ok"}

    rows = [row("gelu", 10, 0.1), row("gelu", 2000, 0.926), row("gelu", 4000, 1.2)]
    rows += [row("add.Tensor", 10, 0.1), row("mul.Tensor", 10, 0.2, shared=False)]
    rows += [row("exp", 10, 0.1), {**row("mul.Tensor", 10, 0.2), "status": "failed: so"}]
    where = {"target": "nvidia:sm90"}
    assert op_defaults.write_any_sizes(rows, where, "all", tmp_path) == path
    op_defaults.write_any_sizes(rows[2:3], where, "first", tmp_path)
    found = read_table(path)
    assert found.ops["gelu"].any_sizes == {"all": 0.93, "first": 1.2}
    assert found.ops["gelu"].ratios == {"4": 0.5} and found.measured == "a GPU"
    assert not found.ops["add.Tensor"].any_sizes and not found.ops["mul.Tensor"].any_sizes
    assert set(found.ops) == set(table["ops"])


def test_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"status": "ok", "family": "norm", "case": "a", "ratio": 2.0}
    ops.plot([row], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert (
        ops.plot([row | {"status": "failed"}], tmp_path / "y.png") == "no plot: no case was timed"
    )


def test_typos(capsys: Any) -> None:
    assert run("--ops", "gleu") == 2
    assert "no op named 'gleu' is declared; close to it: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--write-table")
    assert "--write-table takes --mode call, not kernel" in capsys.readouterr().err
    for wrong in ("5/4", "0/2", "2"):
        with pytest.raises(SystemExit):
            run("--part", wrong)
        assert "argument --part: invalid part value" in capsys.readouterr().err


def test_the_list(capsys: Any) -> None:
    assert run("--list", "--ops", "mv") == 0
    assert "mv-6x34" in capsys.readouterr().out


def test_a_failure_is_told(capsys: Any) -> None:
    base = {"op": "gelu", "shape": "4", "family": "norm", "case": "gelu-4"}
    assert ops.report([base | {"status": "ATen's: because"}]) == 0
    assert ops.report([base | {"status": "wrong: result 0"}]) == 1
    assert "gelu-4: wrong: result 0" in capsys.readouterr().out


# FlagGems ----------------------------------------------------------------------------------------

FAKE = """
import contextlib
import torch

@contextlib.contextmanager
def use_gems():
    library = torch.library.Library("aten", "IMPL")
    key = "CUDA" if torch.cuda.is_available() else "CPU"
    library.impl("gelu", lambda x, *, approximate="none": x * torch.special.ndtr(x), key)
    library.impl("exp", lambda x: x + 1, key)
    library.impl("isfinite", lambda x: 1 // 0, key)  # as its kernels fail on empty operands
    library.impl("index.Tensor", lambda x, indices: 1 // 0, key)
    try:
        yield
    finally:
        library._destroy()
"""


def test_flag_gems_in_a_process_of_its_own(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """It is imported there alone: what it registers stays there."""
    (tmp_path / "flag_gems.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ops.has_flag_gems()
    rows: list[dict[str, Any]] = [
        {"case": "gelu-34", "status": "ok", "gems_us": 1.0},
        {"case": "exp-34", "status": "ok", "gems_us": 1.0},
        {"case": "mv-6x34", "status": "wrong", "gems_us": 1.0},
    ]
    assert ops.add_flag_gems(rows, SETTING) == "FlagGems: 1 of 2 cases timed"
    gelu, exp, mv = rows
    assert gelu["over_flag_gems"] == gelu["flag_gems_us"] / gelu["beside_us"] > 0
    assert exp["flag_gems"].startswith("wrong: result 0 is") and "over_flag_gems" not in exp
    assert set(mv) == {"case", "status", "gems_us"}
    assert "flag_gems" not in sys.modules


def test_flag_gems_may_fail(monkeypatch: Any) -> None:
    monkeypatch.setattr(ops.sys, "executable", "false")  # the command
    rows = [{"case": "gelu-34", "status": "ok", "gems_us": 1.0}]
    assert ops.add_flag_gems(rows, SETTING) == "FlagGems ended with status 1: no word"
    assert "over_flag_gems" not in rows[0]


# tables ------------------------------------------------------------------------------------------


def timed(op: str, *found: tuple[str, int, float], across: bool = False) -> list[dict[str, Any]]:
    facts = {"op": op, "status": "ok", "dtype": "bfloat16", "across": across}
    return [
        {**facts, "shape": s, "elements": n, "ratio": r, "columns": int(s.split("x")[-1])}
        for s, n, r in found
    ]


@pytest.mark.parametrize(
    "ratios, least",
    [((0.5, 0.9), None), ((1.0, 2.0), 10), ((0.5, 2.0), 20), ((2.0, 0.9), None)],
)
def test_the_least_size(ratios: tuple[float, float], least: int | None) -> None:
    rows = timed("gelu", ("2x10", 20, ratios[1]), ("1x10", 10, ratios[0]))
    found = op_defaults.measured(rows)
    assert found == Measured(least, ratios={"1x10": ratios[0], "2x10": ratios[1]})


def test_the_sizes_of_a_softmax() -> None:
    along = timed("_softmax", ("9x4", 36, 0.5), ("9x8", 72, 2.0), ("9x16", 144, 0.8))
    over = timed("_softmax", ("9x4", 36, 3.0), across=True)
    found = op_defaults.measured([*along, *over])
    assert (found.least, found.longest, found.least_across) == (72, 8, 36)
    assert op_defaults.measured(over).least is None
    slow = op_defaults.measured(timed("_softmax", ("9x4", 36, 0.5)))
    assert (slow.least, slow.longest, slow.gains) == (None, None, False)


def test_a_table_is_written_and_added_to(tmp_path: Path) -> None:
    where = {"target": "nvidia:sm80", "gpu": "NVIDIA A100", "torch": "2.13.0+cu129"}
    slow = [*timed("gelu", ("1x10", 10, 0.504)), {"op": "exp", "status": "wrong"}]
    path = op_defaults.write([*slow, *timed("sum", ("1x10", 10, 3.0))], where, tmp_path)
    assert path == path_of("nvidia:sm80", tmp_path) == tmp_path / "nvidia-sm80.json"
    table = read_table(path)
    assert (table.target, table.measured) == ("nvidia:sm80", "NVIDIA A100, torch 2.13, bfloat16")
    assert table.ops == {
        "gelu": Measured(None, ratios={"1x10": 0.5}),
        "sum": Measured(10, ratios={"1x10": 3.0}),
    }
    again = op_defaults.write(timed("sum", ("1x10", 10, 0.9)), where | {"torch": "2.14"}, tmp_path)
    ops = read_table(again).ops
    assert ops["sum"].least is None
    assert ops["gelu"].note == "measured on NVIDIA A100, torch 2.13, bfloat16"


def test_a_call_whose_kernel_is_slower_gains_nothing() -> None:
    rows = timed("median", ("1x10", 10, 1.2), ("1x20", 20, 1.3))
    assert op_defaults.measured(rows).least == 10
    rows[1]["kernel_ratio"] = 0.98
    assert op_defaults.measured(rows).least == 10
    rows[1]["kernel_ratio"] = 0.5
    assert op_defaults.measured(rows).least is None
    rows[0]["kernel_ratio"], rows[1]["kernel_ratio"] = 0.9, 1.1
    assert op_defaults.measured(rows).least == 20


def test_the_tables_of_the_package_are_as_they_are_written() -> None:
    for path in sorted(path_of("nvidia:sm90").parent.glob("*.json")):
        table = read_table(path)
        facts = {"target": table.target, "measured": table.measured, "how": table.how}
        assert path_of(table.target) == path
        assert path.read_text() == op_defaults.text_of(facts, dict(table.ops))


# pytest ------------------------------------------------------------------------------------------


def test_each_family_has_a_file() -> None:
    files = {f"test_{family}_perf.py" for family in op_cases.FAMILIES}
    assert {path.name for path in FOLDER.glob("test_*.py")} == files
    for family in op_cases.FAMILIES:
        text = (FOLDER / f"test_{family}_perf.py").read_text()
        assert f'test_{family} = performance_test("{family}")' in text


def test_a_line(monkeypatch: Any) -> None:
    perf = pytest.importorskip("benchmarks.perf")
    row = {"case": "gelu-34", "mode": "call", "eager_us": 2.0, "gems_us": 1.0, "ratio": 2.0}
    assert perf.line(row | {"status": "ok"}) == "gelu-34, call: 2.00 / 1.00 us = 2.00, - of a copy"
    assert perf.line(row | {"status": "ATen's: why"}) == "gelu-34: ATen's: why"
    test = perf.performance_test("product")
    monkeypatch.setattr(perf, "measure", lambda *_: row | {"status": "wrong: result 0"})
    with pytest.raises(AssertionError, match="wrong: result 0"):
        test("mv-8192x4096", "kernel")
