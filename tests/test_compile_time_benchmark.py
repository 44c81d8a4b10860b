"""The benchmark of compile times: its rows, what it calls a miss, its plot."""

from __future__ import annotations

import gc
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

bench = pytest.importorskip("benchmarks.compile_time", reason="the benchmarks are not installed")
worker = pytest.importorskip("benchmarks.compile_worker")


def row(model: str, backend: str, seconds: float, start: str = "cold", **more: Any) -> Any:
    """A made-up row of one compile."""
    shared = {"status": "ok", "seconds": {}, "device": "cpu", "torch": "2", "commit": "c"}
    found = {"model": model, "backend": backend, "start": start, "compile_s": seconds}
    return {**shared, **found, **more}


def warm(backend: str, seconds: float, dynamo: float, cache: Any = None) -> Any:
    found = row("m", backend, seconds, "warm", cache=cache or {"from the cache": 1})
    return {**found, "seconds": {"Dynamo": dynamo}}


def test_the_warm_compile_in_the_middle_counts() -> None:
    rows = [row("m", "gems", seconds, "warm") for seconds in (3.0, 9.0, 4.0)]
    assert bench.median(rows) == {**rows[2], "all_s": [3.0, 9.0, 4.0]}
    failed = {**rows[1], "status": "failed: no"}
    assert bench.median([rows[0], failed, rows[2]]) is failed


def test_backends_take_turns() -> None:
    """A cold compile finds no caches, each warm one those of the first."""
    times = ["--cold", "2", "--warm", "2"]
    options = bench.arguments(["--models", "gpt2-train", "--layers", "", "--against", "b", *times])
    tasks = bench.tasks(options, Path("c"))
    turns = ("rehearsal", "cold", "cold", "warm", "warm")
    found = [(task["start"], task["backend"]) for task in tasks]
    assert found == [(start, backend) for start in turns for backend in ("gems", "b")]
    caches = [task["caches"] for task in tasks if task["backend"] == "b"]
    rehearsed, first, second, *warm = caches
    assert len({rehearsed, first, second}) == 3 and warm == [first, first]


@pytest.mark.slow
def test_a_row_of_gems_and_a_backend_that_fails(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process a compile: both starts of gems are measured though the other backend fails."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("GEMS_CACHE", "1")
    case, out = "llama-1-layers-inference", tmp_path / "rows.json"
    shape = ["--small", "--models", case, "--layers", "", "--dtype", "float32"]
    shape += ["--warm", "1", "--jobs", "1"]
    where = ["--json", str(out), "--results", str(tmp_path / "rows.jsonl")]
    assert bench.main([*shape, *where, "--backend", "gems", "--against", "nosuch"]) == 1
    rows = json.loads(out.read_text())
    found = {(one["backend"], one["start"]): one for one in rows}
    for start in bench.STARTS:
        ours = found["gems", start]
        assert ours["status"] == "ok"
        assert ours["compile_s"] > 0
        ran = {stage for stage, seconds in ours["seconds"].items() if seconds > 0}
        again = {"load", "triton", "bind"}  # what is left of them in a second process
        assert ran & {*worker.GEMS} == ({*worker.GEMS} - {"load"} if start == "cold" else again)
        assert {"Dynamo", "entry"} <= ran and ("AOT" in ran) is (start == "cold")
        assert [*ours["cache"]] == ["kept" if start == "cold" else "from the cache"]
        assert all(ours[count] > 0 for count in (*bench.COUNTS, *bench.SHARES))
        assert ours["nodes"] > ours["calls"]
        assert not ours["failures"]
    assert found["nosuch", "cold"]["status"].startswith("failed: ")
    assert found["nosuch", "warm"]["status"].startswith("skipped: ")
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == list(map(json.dumps, rows))
    printed = capsys.readouterr().out
    assert f"{case} through nosuch, cold: failed" in printed


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([row("m", "gems", 4.0), row("m", "inductor", 10.0)], []),
        ([row("m", "gems", 4.1), row("m", "inductor", 10.0)], ["cold geomean 0.41x inductor"]),
        ([warm("gems", 9.0, 8.0), warm("inductor", 10.0, 8.0)], []),
        ([warm("gems", 10.5, 9.0), warm("inductor", 10.0, 9.0)], ["m, warm: 1.05x inductor"]),
        ([warm("gems", 3.5, 2.0)], ["m, warm: 3.50 s, at most 1.2x Dynamo's own + 1.0 s"]),
        (
            [warm("gems", 3.0, 2.0, {"from the cache": 2, "not kept: it was late": 1})],
            ["m, warm: 1 graphs were compiled anew: not kept: it was late"],
        ),
        ([row("m", "gems", 5.0), row("m", "aot_eager", 2.0)], []),
        ([row("m", "gems", 5.1), row("m", "aot_eager", 2.0)], ["m, cold: 3.10 s over aot_eager"]),
        # a cold compile is not compared with a warm one
        ([row("m", "gems", 9.0), row("m", "aot_eager", 2.0, "warm")], []),
        ([row("m", "gems", 1.0, own_ms_a_node=0.25)], []),
        ([row("m", "gems", 1.0, own_ms_a_node=0.26)], ["m, cold: own Python 0.260 ms a node"]),
        ([row("m", "gems", 1.0, failures=["k: E"])], ["m, cold: failed to compile: k: E"]),
        ([row("m", "gems", 9.0), row("m", "aot_eager", 0.0, status="failed: oom")], []),
    ],
)
def test_misses(rows: list[Any], missed: list[str]) -> None:
    for one in rows:
        if one["status"] != "ok":
            del one["compile_s"]
    found = bench.misses(rows, "gems")
    assert len(found) == len(missed)
    assert all(line.startswith(start) for line, start in zip(found, missed, strict=True))


@pytest.mark.parametrize(("seconds", "missed"), [(42.0, 0), (43.0, 1)])
def test_depth(seconds: float, missed: int) -> None:
    rows = [
        row("llama-16-layers-train", "gems", 10.0),
        row("llama-64-layers-train", "gems", seconds),
        row("llama-64-layers-inference", "gems", 99.0),  # 16 layers were not measured
    ]
    found = bench.misses(rows, "gems")
    assert found == ["train, cold: 64 layers 4.30x of 16 layers, at most 4.2x"] * missed


def test_stages_of_a_step() -> None:
    """Both graphs are compiled within AOTAutograd's time, and their kernels waited for after."""
    spent = {worker.WHOLE: 9.0, worker.HANDED: 6.0, worker.AOT: 5.0}
    forward = SimpleNamespace(kind="forward", seconds={"passes": 0.25, "triton": 0.75})
    backward = SimpleNamespace(kind="backward", seconds={"passes": 0.5})
    found = worker.stages(spent, [forward, backward], "gems")
    assert {name: found[name] for name in ("Dynamo", "entry", "AOT", "compiler")} == {
        "Dynamo": 3.0,
        "entry": 1.0,
        "AOT": 4.25,
        "compiler": 1.5,
    }
    assert (found["passes"], found["triton"], found["bind"]) == (0.75, 0.75, 0.0)
    assert worker.stages({}, [], "inductor") == {}  # a torch that times nothing


def test_collecting() -> None:
    with worker.collecting() as pauses:
        gc.collect()
    assert len(pauses) >= 1
    assert min(pauses) > 0
    count = len(pauses)
    gc.collect()
    assert len(pauses) == count


def test_rows_that_are_alike(tmp_path: Path) -> None:
    """A report holds the newest of each case, measured as the last one was."""
    path = tmp_path / "rows.jsonl"
    rows = [
        row("m", "gems", 1.0, commit="older"),
        row("m", "gems", 2.0),
        row("n", "gems", 3.0),
        row("m", "gems", 4.0),
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert [one["compile_s"] for one in bench.alike(path)] == [4.0, 3.0]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(f"llama-{layers}-layers-{kind}", backend, seconds, start)
        for layers, seconds in ((2, 1.0), (16, 5.0), (64, 18.0))
        for kind in ("inference", "train")
        for backend in ("gems", "aot_eager", "inductor")
        for start in bench.STARTS
    ]
    path = tmp_path / "new" / "plot.svg"
    assert bench.plot(rows, path) == f"plot: {path}"
    assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text()
    assert all(f">{label}<" in text for label in ("gems, cold", "inductor, warm", "layers"))
    assert bench.plot([row("m", "gems", 1.0)], path).startswith("no plot: ")


def test_no_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "plot.svg"
    assert "matplotlib" in bench.plot([row("llama-2-layers-train", "gems", 1.0)], path)
    assert not path.exists()
