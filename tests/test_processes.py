"""One measurement at a time, each in a process of its own, on a machine that does nothing else."""

from __future__ import annotations

import multiprocessing
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

processes = pytest.importorskip("benchmarks.processes", reason="the benchmarks are not installed")

WORKER = """
import json, sys, time
from pathlib import Path
from benchmarks.processes import serve_row

task = json.loads(sys.argv[-1])
out = Path(task["out"])
if task.get("dies"):
    print("no such module")
    sys.exit(3)
time.sleep(task["imports"])
ready = time.time()
out.with_name("ready").touch()
sys.stdin.readline()
begin = time.time()
time.sleep(task.get("measures", 0.1))
serve_row(out, {"status": "ok", "ready": ready, "begin": begin, "end": time.time()})
time.sleep(60)  # as its compile workers end
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "a_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "AT_MOST_S", 0.5)
    return {"worker": "a_worker", "imports": 0.0}


def test_none_measures_while_another_imports(worker: dict[str, Any]) -> None:
    """Nor while another measures; what a process does after its row is not waited for."""
    tasks = [{**worker, "imports": seconds} for seconds in (0.0, 0.6, 0.3, 0.0)]
    start = time.monotonic()
    rows = list(processes.measured(tasks, 2, 30.0))
    assert time.monotonic() - start < 30
    for two in (rows[:2], rows[2:]):
        assert max(row["ready"] for row in two) <= min(row["begin"] for row in two)
    assert all(a["end"] <= b["begin"] for a, b in pairwise(rows))


def test_a_worker_that_dies_or_takes_too_long(worker: dict[str, Any]) -> None:
    tasks = [{**worker, "dies": True}, worker, {**worker, "measures": 60.0}]
    died, ran, slow = processes.measured(tasks, 3, 2.0)
    assert (died["status"], ran["status"]) == ("failed: exit status 3", "ok")
    assert died["log"] == "no such module\n"
    assert slow["status"] == "failed: more than 2 s"


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux tells what its cores do")
def test_a_busy_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as somebody computes, and not for ever."""
    others = multiprocessing.get_context("spawn").Process(target=spin, args=(30.0,), daemon=True)
    others.start()
    try:
        time.sleep(1.0)
        monkeypatch.setattr(processes, "AT_MOST_S", 1.5)
        start = time.monotonic()
        processes.wait_until_idle()
        assert 1.5 <= time.monotonic() - start < 10
    finally:
        others.kill()
        others.join()


def test_an_idle_machine_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 10.4, 10.45, 20.0])
    monkeypatch.setattr(processes, "busy_seconds", lambda: next(seconds))
    processes.wait_until_idle()
    assert next(seconds) == 20.0
    monkeypatch.setattr(processes, "busy_seconds", lambda: None)  # nobody tells
    processes.wait_until_idle()
