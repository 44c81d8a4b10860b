"""Compile workers: a process forked for each kernel, by one that has imported Triton."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gems_compile.lowering.load import Pool
from gems_compile.lowering.worker import Nursery

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Asked:
    """A nursery in a process of its own: pytest's has threads."""

    def __init__(self, size: int, work: Callable[[bytes], bytes]) -> None:
        read, self.to = os.pipe()
        self.answers, write = os.pipe()
        self.process = os.fork()
        if not self.process:
            try:
                os.close(self.to)
                Nursery(size, read, write, work, lambda job: None).run()
            finally:
                os._exit(0)
        os.close(read)
        os.close(write)

    def ask(self, *jobs: dict[str, Any]) -> None:
        os.write(self.to, b"".join(json.dumps(job).encode() + b"\n" for job in jobs))

    def end(self) -> list[dict[str, Any]]:
        os.close(self.to)
        with os.fdopen(self.answers) as answers:
            told = [json.loads(line) for line in answers]
        os.waitpid(self.process, 0)
        return told


def test_each_job_is_answered() -> None:
    def work(line: bytes) -> bytes:
        job = json.loads(line)
        if job["path"] == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return json.dumps({"path": job["path"], "error": None}).encode() + b"\n"

    asked = Asked(4, work)
    asked.ask({"path": "a"}, {"path": "b"}, {"path": "c" * 5000})
    told = {t["path"]: t["error"] for t in asked.end()}
    assert told["a"] is None and told["c" * 5000] is None
    assert told["b"].startswith("OSError")  # which the asker compiles itself


def test_so_many_at_a_time(tmp_path: Path) -> None:
    def work(line: bytes) -> bytes:
        mine = tmp_path / json.loads(line)["path"]
        mine.touch()
        time.sleep(0.2)
        running = len(list(tmp_path.iterdir()))
        mine.unlink()
        return json.dumps({"path": mine.name, "error": running}).encode() + b"\n"

    asked = Asked(2, work)
    asked.ask(*({"path": str(k)} for k in range(5)))
    with os.fdopen(os.dup(asked.answers)) as answers:
        told = [json.loads(answers.readline()) for _ in range(5)]
    asked.end()
    assert sorted(t["path"] for t in told) == list("01234")
    assert 1 <= max(t["error"] for t in told) <= 2


def test_what_waits_is_dropped_with_the_asker(tmp_path: Path) -> None:
    def work(line: bytes) -> bytes:
        time.sleep(0.2)
        (tmp_path / json.loads(line)["path"]).touch()
        return line

    asked = Asked(1, work)
    asked.ask({"path": "runs"}, {"path": "waits"})
    time.sleep(0.1)
    asked.end()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def bad_job(path: Path) -> dict[str, Any]:
    return {
        "path": str(path),
        "text": "is no Python",
        "meta": {"name": "kernel"},
        "target": ["cuda", 90, 32],
    }


def test_lost_workers_are_replaced(tmp_path: Path) -> None:
    pool = Pool(2)
    try:
        assert "SyntaxError" in str(pool.submit(bad_job(tmp_path / "a.py")).get(timeout=300))
        assert (tmp_path / "a.py").read_text() == "is no Python"
        assert pool.workers is not None
        lost = pool.workers
        lost.process.kill()
        lost.process.wait()
        pending = pool.submit(bad_job(tmp_path / "b.py")).get(timeout=300)
        assert "SyntaxError" in str(pending) or str(pending).startswith("OSError")
        assert "SyntaxError" in str(pool.submit(bad_job(tmp_path / "c.py")).get(timeout=300))
        assert pool.workers is not lost
    finally:
        pool.close()
