"""A process for each measurement, one measurement at a time on an idle machine.

The next few processes import side by side, which takes most of a short measurement's time, and
none measures until all have: beside a neighbour's import a warm compile of Llama's decoding took
5.4 and 5.9 s on an H100's host, and 4.2 and 4.6 s alone.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "GEMS_CACHE_DIR", "XDG_CACHE_HOME")

IDLE_CORES = 0.5  # busy ones that a machine counts as idle with
LOOK_S, AT_MOST_S = 0.25, 10.0  # how long one look takes, and a wait for others to end
POLL_S = 0.05


@dataclass
class Worker:
    """A process for one task: it imports, says that it is ready, waits for ``go``, measures, and
    writes its row.

    The task may name the module that measures (``worker``) and a folder of ``caches`` to share;
    without one the process gets empty caches of its own.
    """

    task: dict[str, Any]
    folder: tempfile.TemporaryDirectory[str]
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, task: dict[str, Any]) -> Worker:
        folder = tempfile.TemporaryDirectory(prefix="gems-bench-", ignore_cleanup_errors=True)
        place = Path(folder.name)
        shared = Path(task.get("caches") or place)
        caches = {name: str(shared / name.lower()) for name in CACHES}
        task = {**task, "out": str(place / "row.json")}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", task.get("worker", "benchmarks.worker"), json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **caches, "PYTHONPATH": path},
                start_new_session=True,
            )
        return cls(task, folder, process)

    def wait_for(self, name: str, timeout: float) -> bool:
        """Whether the process wrote a file within some seconds; False at once when it ended."""
        found, end = Path(self.folder.name) / name, time.monotonic() + timeout
        while not found.exists():
            if self.process.poll() is not None:
                return found.exists()
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        return True

    def row(self, timeout: float) -> dict[str, Any]:
        """Let the worker go and return its row, a failed one if it died or ran out of time.

        It is not waited for once the row is there: Inductor's workers take ten seconds to end.
        """
        place, start = Path(self.folder.name), time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it may have died on import: its status says so
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()
        if self.wait_for("row.json", timeout):
            row = json.loads((place / "row.json").read_text())
        else:
            code = self.process.poll()
            why = f"more than {timeout:.0f} s" if code is None else f"exit status {code}"
            row = {"status": f"failed: {why}"}
        if row["status"].startswith("failed"):
            row["log"] = (place / "log").read_text(errors="replace")[-4000:]
        self.stop()
        return {**row, "wall_s": round(time.monotonic() - start, 1)}

    def stop(self) -> None:
        """End the process and what it started (a compiler's workers), and drop its caches."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


def serve_row(out: Path, row: dict[str, Any]) -> None:
    """What a worker has measured, all of it at once."""
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(row))
    partial.replace(out)


def measured(tasks: list[dict[str, Any]], jobs: int, timeout: float) -> Iterator[dict[str, Any]]:
    """The rows of the tasks in order, one at a time; ``jobs`` processes import side by side."""
    write_bytecode()
    waiting: list[Worker] = []
    try:
        for i in range(len(tasks)):
            if not waiting:
                waiting.extend(map(Worker.start, tasks[i : i + jobs]))
                for worker in waiting:
                    worker.wait_for("ready", timeout)
            wait_until_idle()
            # it stays in the list while it measures, so that an interrupt ends it too
            yield waiting[0].row(timeout)
            waiting.pop(0)
    finally:
        for worker in waiting:
            worker.stop()


def write_bytecode() -> None:
    """As pip does for what it installs: no process that is measured compiles this checkout's
    Python, also where PYTHONDONTWRITEBYTECODE would have each do it (0.3 s on two cores)."""
    for package in ("gems_compile", "kernels", "lowering"):
        compileall.compile_dir(ROOT / package, quiet=2)


def wait_until_idle() -> None:
    """Wait for the ends of earlier processes, and for whoever else computes; not for ever."""
    end, before = time.monotonic() + AT_MOST_S, busy_seconds()
    while before is not None and time.monotonic() < end:
        time.sleep(LOOK_S)
        now = busy_seconds()
        if now is None or now - before < IDLE_CORES * LOOK_S:
            return
        before = now


def busy_seconds() -> float | None:
    """Seconds that all cores have computed since the start; None where Linux does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
