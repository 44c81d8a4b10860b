"""Runs the kernels that a dump wrote, beside what eager PyTorch computes in their place.

``python graph_00_forward/replay.py --check | --bench | --bisect``; see ``docs/dumps.md``. Kernels
are loaded from their files, so that they can be edited; ``references.py`` has the references, and
``report.json`` how everything is called. Without a GPU kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .replayed import Outcome, Replayed


def main(folder: Path, argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a kernel differs, 2 where nothing can be run."""
    args = _parser().parse_args(argv)
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
    from .replayed import CannotReplay, Replayed

    try:
        replayed = Replayed(folder, torch.device(device))
        inputs = replayed.saved(args.inputs) if args.inputs else None
        calls = replayed.chosen(args.group, inputs)
        if args.bench:
            return _bench(replayed, calls, inputs, args.json)
        if args.bisect:
            return _bisect(replayed, inputs, args.json)
        return _check(replayed, calls, inputs, args.json)
    except CannotReplay as why:
        print(why, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="replay.py", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare each kernel with eager")
    what.add_argument("--bench", action="store_true", help="time each kernel, and eager")
    what.add_argument("--bisect", action="store_true", help="run all; who differs first?")
    parser.add_argument("--group", metavar="NAME", help="a kernel's name, or a call's number")
    parser.add_argument("--inputs", metavar="FILE", help="tensors that were saved (torch.save)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    return parser


# --check and --bisect -----------------------------------------------------------------------------


def _check(replayed: Replayed, calls: list[Any], inputs: Any, as_json: bool) -> int:
    launches = [call for call in calls if call["kind"] == "kernel"]
    outcomes = [replayed.check(call, dict(inputs or {})) for call in launches]
    wrong = sum(o.what == "differs" for o in outcomes)
    left = sum(o.what == "not checkable" for o in outcomes)
    said = f"{wrong} of {len(outcomes)} launches differ" if wrong else "no launch differs"
    if left:
        said += f"; {left} of {len(outcomes)} are not checkable by themselves"
    _show(f"{replayed.name}: each launch and its reference", outcomes, said, as_json)
    return int(wrong > 0 or any(o.what == "fails" for o in outcomes))


def _bisect(replayed: Replayed, inputs: Any, as_json: bool) -> int:
    outcomes = replayed.bisect(inputs)
    last = outcomes[-1] if outcomes else None
    if last is not None and last.what in ("differs", "fails"):
        fed = "\n".join(f"  {name}: {told}" for name, told in last.fed.items())
        said = f"the first that differs is {last.name} (call {last.place}); it was fed\n{fed}"
    else:
        said = "no launch differs"
    _show(f"{replayed.name}: step by step, on eager's values", outcomes, said, as_json)
    return int(last is not None and last.what in ("differs", "fails"))


def _show(title: str, outcomes: list[Outcome], said: str, as_json: bool) -> None:
    if as_json:
        rows = [vars(o) for o in outcomes]
        print(json.dumps({"title": title, "launches": rows, "said": said}, indent=1, default=str))
        return
    from ..tables import Table, show

    table = Table(title, ("call", "kernel", "result", "detail"))
    table.rows.extend((o.place, o.name, o.what, o.detail) for o in outcomes)
    show([table])
    print(f"\n{said}")


# --bench ------------------------------------------------------------------------------------------


def _bench(replayed: Replayed, calls: list[Any], inputs: Any, as_json: bool) -> int:
    timed = replayed.bench(calls, dict(inputs or {}))
    if replayed.is_whole and len(timed) == len(replayed.calls):
        replayed.write_times([t.us for t in timed])
    note = ""
    if replayed.device.type == "cpu":
        note = "Kernels ran in Triton's interpreter: these times are no measure of anything."
    if as_json:
        print(json.dumps({"calls": [vars(t) for t in timed], "note": note}, indent=1))
        return 0
    from ..tables import Table, show

    def cell(number: float | None) -> Any:
        return "" if number is None else number

    columns = ("call", "kernel", "us", "GB/s", "% of peak", "eager us", "")
    table = Table(f"{replayed.name}: microseconds a call", columns)
    table.rows.extend(
        (t.place, t.name, cell(t.us), cell(t.gbps), cell(t.peak), cell(t.eager_us), t.detail)
        for t in timed
    )
    show([table, note])
    return 0
