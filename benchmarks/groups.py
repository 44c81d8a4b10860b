"""Time fused groups on the device: ``python -m benchmarks.groups --against eager,inductor``.

A group is a norm, a loss, an optimizer step: a handful of ops of a real model that should be one
kernel or two. Its time is compared with that of the other backends, and with the time that a copy
of its least bytes takes in the same run (between the two nearest of some copies that are timed: a
short kernel pays for its start and end, whoever wrote it). ``benchmarks.group_worker`` says how
time is taken; a few of its processes compile at once, and one at a time measures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from benchmarks import table
from benchmarks.models import append, stamp
from benchmarks.processes import CACHES, ROOT
from benchmarks.table import Row, number

# what the shares are of; see ``group_cases.COPIED``
COPIES = [f"copy-{n}" for n in ("2^20", "2^22", "2^24", "25165824", "2^26", "2^28", "2^29")]

# targets on a GPU: least bytes over time, as a share of copy, by class
SHARES = {"pointwise": 0.95, "row": 0.90, "norm_backward": 0.85}
LOSS, EACH, MEAN = 1.5, 0.97, 1.15  # x Inductor: loss with gradient, any group, geometric mean


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.groups",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    cores = os.cpu_count() or 1
    add("--groups", help="comma list of names or their beginnings (default: all)")
    add("--against", default="eager,inductor", help="comma list: eager, inductor, inductor:MODE")
    add("--backend", default="gems", help="the backend that is measured (default: gems)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--small", action="store_true", help="tiny shapes, for a CPU with TRITON_INTERPRET=1")
    add("--seconds", type=float, default=0.2, help="of timing per group and backend (default: 0.2)")
    add("--timeout", type=float, default=120.0, help="seconds per group and backend (default: 120)")
    add("--jobs", type=int, default=max(1, min(4, cores // 4)), help="processes that compile")
    add("--json", type=Path, help="write all rows to this file")
    where = "append each row here (default: results/groups.jsonl, nowhere with --small)"
    add("--results", type=Path, help=where)
    add("--list", action="store_true", help="print the groups and their least megabytes")
    return parser.parse_args(argv)


def names(wanted: str | None) -> list[str]:
    """The groups of a comma list of names or beginnings of names."""
    from benchmarks.group_worker import GROUPS

    found: dict[str, None] = {}
    for word in (part.strip() for part in (wanted or "").split(",")):
        hits = [name for name in GROUPS if name.startswith(word)]
        if not hits:
            raise ValueError(f"--groups {word}: no such group; --list prints them")
        found.update(dict.fromkeys(hits))
    return list(found)


def backends_of(options: argparse.Namespace) -> list[str]:
    """Eager first, then the backend that is measured, then the others."""
    against = [name for name in options.against.split(",") if name]
    first = ["eager"] if "eager" in against else []
    return list(dict.fromkeys([*first, options.backend, *against]))


# ------------------------------------------------------------------------ processes


@dataclass
class Worker:
    """A process of ``benchmarks.group_worker``, which measures one group at a time."""

    process: subprocess.Popen[str]
    log: Path

    @classmethod
    def start(cls, task: Row, place: Path, number: int) -> Worker:
        caches = {name: str(place / name.lower()) for name in CACHES}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        log = place / f"log-{number}"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.group_worker", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**compilers(task["jobs"]), **os.environ, **caches, "PYTHONPATH": path},
                start_new_session=True,
            )
        return cls(process, log)

    def rows(self, group: str, backends: list[str], timeout: float) -> Iterator[Row]:
        """The group's rows; fewer where the process dies or takes too long over one."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):  # it has died: there will be no answer either
            print(json.dumps({"group": group, "backends": backends}), file=self.process.stdin)
            self.process.stdin.flush()
        for _ in backends:
            late = threading.Timer(timeout, self.stop)
            late.start()
            line = self.process.stdout.readline()
            late.cancel()
            if not line:
                return
            yield json.loads(line)

    def stop(self) -> None:
        """End the process and what it started (a compiler's workers)."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def death(self) -> str:
        """The status of the row that a process died over, with the last line of its log."""
        try:
            status = self.process.wait(10.0)
        except subprocess.TimeoutExpired:  # it closed its output, and hangs
            self.stop()
            status = self.process.wait()
        what = "killed, or out of time" if status == -signal.SIGKILL else f"exit status {status}"
        lines = self.log.read_text(errors="replace").strip().splitlines() or [""]
        return f"failed: {what}: {lines[-1][:300]}"


def compilers(jobs: int) -> dict[str, str]:
    """Each process's share of the cores, for the workers that compile its kernels."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"TORCHINDUCTOR_COMPILE_THREADS": share, "GEMS_THREADS": share}


class Pool:
    """Processes that measure groups, each kept for the next group while it lives."""

    def __init__(self, task: Row, timeout: float, place: Path) -> None:
        self.task, self.timeout, self.place = task, timeout, place
        self.workers: list[Worker] = []
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def worker(self) -> Worker:
        with contextlib.suppress(queue.Empty):
            return self.idle.get_nowait()
        self.workers.append(Worker.start(self.task, self.place, len(self.workers)))
        return self.workers[-1]

    def measure(self, group: str) -> list[Row]:
        """A row per backend. What kills a process fails; the rest goes on in another one."""
        left = ["eager"] if group in COPIES else list(self.task["backends"])
        found: list[Row] = []
        while left:
            worker = self.worker()
            rows = list(worker.rows(group, left, self.timeout))
            found += rows
            left = left[len(rows) :]
            if rows and rows[-1]["lost"]:
                continue  # it has said why, and ended
            if left:
                row = {"group": group, "backend": left.pop(0), "small": self.task["small"]}
                found.append({**row, "status": worker.death()})
            else:
                self.idle.put(worker)
        return found

    def run(self, groups: list[str]) -> Iterator[list[Row]]:
        """The rows of each group, as they come."""
        with ThreadPoolExecutor(self.task["jobs"]) as pool:
            try:
                for done in as_completed([pool.submit(self.measure, group) for group in groups]):
                    yield done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in self.workers:
                    worker.stop()


# ------------------------------------------------------------------------ the table


def index(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """The measured rows by group and backend."""
    return {(row["group"], row["backend"]): row for row in rows if row["status"] == "ok"}


def speed(found: dict[tuple[str, str], Row], row: Row, other: str) -> float | None:
    """How many times as fast as ``other``, or None."""
    its = found.get((row["group"], other))
    return its["us"] / row["us"] if its and "us" in row else None


def copy_us(found: dict[tuple[str, str], Row], size: int) -> float | None:
    """What a copy takes that moves ``size`` bytes: on the line through the two nearest sizes."""
    timed = [found[name, "eager"] for name in COPIES if (name, "eager") in found]
    if len(timed) < 2:
        return None
    above = next((i for i, row in enumerate(timed) if row["bytes"] >= size), len(timed) - 1)
    low, high = timed[max(above, 1) - 1], timed[max(above, 1)]
    slope = (high["us"] - low["us"]) / (high["bytes"] - low["bytes"])
    return max(low["us"] + slope * (size - low["bytes"]), 0.0)


def share(found: dict[tuple[str, str], Row], row: Row) -> float | None:
    """How long a copy of the row's least bytes takes, over its time; None if not measured."""
    copied = copy_us(found, row["bytes"]) if "us" in row else None
    return copied / row["us"] if copied is not None else None


def header(others: list[str]) -> list[str]:
    ratios = [f"x {other}" for other in others]
    return ["group", "backend", "us", "GB/s", "of copy", *ratios, "kernels", "error"]


def cells(row: Row, found: dict[tuple[str, str], Row], others: list[str]) -> list[str]:
    """One line of the table."""
    if row["status"] != "ok":
        short = row["status"].partition(":")[0]  # the reason is printed below the table
        return [row["group"], row["backend"], short, *[""] * (len(header(others)) - 3)]
    ratios = [
        number(speed(found, row, other), ".2f") if other != row["backend"] else ""
        for other in others
    ]
    marks = {"graph": "", "queue": "", "wall": "", "profiler": "~"}
    return [
        row["group"],
        row["backend"],
        marks[row["how"]] + number(row["us"], ".1f"),
        number(row["gb_s"], ".0f"),
        number(share(found, row), ".2f"),
        *ratios,
        number(row.get("kernels"), "d"),
        number(row["error"], ".1e") + ("!" if row["inaccurate"] else ""),
    ]


def means(found: dict[tuple[str, str], Row], backends: list[str]) -> list[str]:
    """The geometric mean of speed of each backend against each other."""
    lines = []
    for backend in (name for name in backends if name != "eager"):
        rows = [row for (_, name), row in found.items() if name == backend]
        for other in (name for name in backends if name != backend):
            mean, count = table.geomean(filter(None, (speed(found, row, other) for row in rows)))
            if count:
                lines.append(f"{backend} / {other}, geomean (groups): {mean:.2f}x ({count})")
    return lines


def misses(rows: list[Row], backend: str) -> list[str]:
    """Where the backend misses a target; nothing of what was timed by wall clock."""
    found, lines = index(rows), []
    mine = [row for row in found.values() if row["backend"] == backend and row["how"] != "wall"]
    for row in mine:
        part, least = share(found, row), SHARES.get(row["target"], 0.0)
        if part is not None and part < least:
            lines.append(
                f"{row['group']}: {part:.2f} of copy, {row['target']} at least {least:.2f}"
            )
        times, least = speed(found, row, "inductor"), LOSS if row["target"] == "loss" else EACH
        if times is not None and times < least:
            lines.append(f"{row['group']}: {times:.2f}x inductor, at least {least:.2f}x")
    mean, count = table.geomean(filter(None, (speed(found, row, "inductor") for row in mine)))
    if count and mean < MEAN:
        lines.append(f"geometric mean: {mean:.2f}x inductor, at least {MEAN:.2f}x")
    return lines


def report(rows: list[Row], backends: list[str], backend: str) -> int:
    """Print the table and what it amounts to; 1 if a group failed or is not accurate enough."""
    found = index(rows)
    others = [name for name in backends if name != backend]
    table.show(header(others), [cells(row, found, others) for row in rows])
    print("GB/s: least bytes / time; of copy: a copy of as many bytes takes this part of the time.")
    print("x NAME: NAME's time / this time.")
    print("error: largest ||out - ref|| / ||ref|| of the results, ref: eager in float64, with")
    print("dropout 0; !: more than 1.2 times eager's. ~: kernels' times added up by the profiler.")
    copies = [found[name, "eager"] for name in COPIES if (name, "eager") in found]
    for row in copies:
        print(f"{row['group']}: {row['us']:.1f} us, {row['gb_s']:.0f} GB/s")
    for line in means(found, backends):
        print(line)
    for line in misses(rows, backend):
        print("misses its target: " + line)
    wrong = [row for row in found.values() if row["backend"] == backend and row["inaccurate"]]
    for row in wrong:
        which = ", ".join(map(str, row["inaccurate"]))
        print(
            f"not accurate enough: {row['group']}: {row['error']:.2e} (eager "
            f"{row['eager_error']:.2e}), results {which}"
        )
    for row in found.values():
        for failure in row.get("failures", ()):
            print(f"{row['group']}: a kernel did not compile: {failure}")
    failed = [row for row in rows if row["status"] != "ok"]
    for row in failed:
        print(f"{row['group']} through {row['backend']}: {row['status']}")
    return 1 if failed or wrong else 0


def show_list(groups: list[str]) -> None:
    from benchmarks.group_worker import GROUPS

    head = ["group", "timed", "target", "least MB"]
    shown = [GROUPS[name] for name in groups]
    table.show(head, [[g.name, g.step, g.target, f"{g.least_bytes() / 1e6:.1f}"] for g in shown])


def measure(groups: list[str], backends: list[str], options: argparse.Namespace) -> list[Row]:
    """All rows, printed and kept as they come, in the order of the groups."""
    sink = options.results or (None if options.small else ROOT / "results" / "groups.jsonl")
    common, found, start = stamp(), {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gems-bench-", ignore_cleanup_errors=True) as place:
        task = {name: getattr(options, name) for name in ("small", "seconds", "device", "jobs")}
        task |= {"backends": backends, "lock": str(Path(place) / "lock")}
        for rows in Pool(task, options.timeout, Path(place)).run(groups):
            rows = [{**row, **common} for row in rows]
            found[rows[0]["group"]] = rows
            for row in rows:
                append(row, sink)
            times = [
                f"{row['backend']} {row['us']:.1f} us" if "us" in row else row["status"]
                for row in rows
            ]
            spent = time.monotonic() - start
            print(f"{rows[0]['group']}: {', '.join(times)} [{spent:.0f} s]", flush=True)
    return [row for group in groups for row in found[group]]


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        groups = names(options.groups)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        show_list(groups)
        return 0
    backends = backends_of(options)
    rows = measure(list(dict.fromkeys([*COPIES, *groups])), backends, options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return report(rows, backends, options.backend)


if __name__ == "__main__":
    raise SystemExit(main())
