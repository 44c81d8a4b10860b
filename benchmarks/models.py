"""Time whole models: ``python -m benchmarks.models --against eager,inductor``.

Each (model, backend) runs in a fresh process with empty caches, one measurement at a time, on a
machine that does nothing else.
Speed is ``x other``: the other's milliseconds over this backend's, above 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.processes import ROOT, measured


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    add = parser.add_argument
    add("--against", default="eager,inductor", help="comma list: eager, inductor, inductor:MODE")
    add("--seconds", type=float, default=2.0, help="steady measurement per case (default: 2)")
    add(
        "--errors",
        default="both",
        choices=("both", "all", "none"),
        help="whose error is taken: eager's and the backend's (default), everyone's, nobody's",
    )
    where = "append each row here (default: results/models.jsonl, nowhere with --small)"
    add("--results", type=Path, help=where)
    add_shared(parser)
    return parser.parse_args(argv)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that gives each case a process."""
    add = parser.add_argument
    add("--models", help="comma list; resnet50 means resnet50-inference and resnet50-train")
    add("--backend", default="gems", help="the backend that is measured (default: gems)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--device", help="default: cuda where there is one, else cpu")
    add("--small", action="store_true", help="tiny shapes, for a CPU with TRITON_INTERPRET=1")
    add("--timeout", type=float, default=300.0, help="seconds per case (default: 300)")
    add(
        "--jobs",
        type=int,
        choices=range(1, 17),
        metavar="N",
        default=4 if (os.cpu_count() or 1) >= 8 else 1,
        help="processes that import side by side, before one after the other measures"
        " (default: 4 with 8 cores, else 1)",
    )
    add("--json", type=Path, help="write all rows to this file")


def stamp() -> dict[str, str]:
    """What every row of a run shares: commit and date."""
    return {"commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def append(row: dict[str, Any], sink: Path | None) -> None:
    """Add a row to a file of one JSON object a line; nowhere with None."""
    if sink is None:
        return
    sink.parent.mkdir(parents=True, exist_ok=True)
    with sink.open("a") as file:
        file.write(json.dumps(row) + "\n")


def commit() -> str:
    """The commit of this checkout, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True)
    except OSError:
        return "unknown"
    if found.returncode:
        return "unknown"
    return found.stdout.decode().strip() + ("-dirty" if state.stdout else "")


def report(rows: list[dict[str, Any]], backends: list[str], options: argparse.Namespace) -> int:
    """Print the table and what it amounts to; 1 if a model failed, in part too, or is not accurate
    enough."""
    lines = [table.cells(row, table.index(rows), backends) for row in rows]
    table.show(table.header(backends), lines)
    base = "float64" if options.dtype == "float32" else "float32"
    print(
        f"error: ||out - ref|| / ||ref||, ref: {base} eager, the same weights; grad error: over all"
    )
    print("gradients; vs eager: ref is eager in this dtype. *: compared with dropout 0, timed with")
    print("dropout. x NAME: NAME's ms / this ms.")
    for line in table.means(rows, backends, options.dtype):
        print(line)
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['model']} through {row['backend']}: {row['status']}")
    failed = [row for row in rows if row["status"].startswith("failed")]
    for row in failed:
        print(f"\n{row['model']} through {row['backend']}:", file=sys.stderr)
        print(row.get("log", "")[-1500:], file=sys.stderr)
    missed = table.misses(rows, options.backend, options.dtype)
    for line in missed:
        print("not accurate enough: " + line)
    left = fallbacks(rows)
    for line in left:
        print(line)
    return 1 if failed or missed or left else 0


def fallbacks(rows: list[dict[str, Any]]) -> list[str]:
    """Models that ran, but parts of which the backend failed to compile: their times are ATen's."""
    return [
        f"{row['model']} through {row['backend']}: ran as ATen: {text}"
        for row in rows
        for text in row.get("failures", ())
    ]


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    from benchmarks.cases import names

    try:
        models = names(options.models)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    against = [name for name in options.against.split(",") if name]
    rest = [name for name in against if name not in ("eager", options.backend)]
    backends = [*(["eager"] if "eager" in against else []), options.backend, *rest]
    shared = {
        "dtype": options.dtype,
        "small": options.small,
        "seconds": options.seconds,
        "device": options.device,
    }
    accurate = {"both": ["eager", options.backend], "all": backends, "none": []}[options.errors]
    tasks = [
        {"model": model, "backend": backend, "errors": backend in accurate, **shared}
        for model in models
        for backend in backends
    ]
    common = stamp()
    sink = options.results or (None if options.small else ROOT / "results" / "models.jsonl")
    rows = []
    for task, row in zip(tasks, measured(tasks, options.jobs, options.timeout), strict=True):
        row = {**{k: task[k] for k in ("model", "backend", "dtype", "small")}, **row, **common}
        rows.append(row)
        found = f"{row['ms']:.3f} ms" if row["status"] == "ok" else row["status"]
        print(f"{row['model']} {row['backend']}: {found} [{row['wall_s']} s]", flush=True)
        append(row, sink)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return report(rows, backends, options)


if __name__ == "__main__":
    raise SystemExit(main())
