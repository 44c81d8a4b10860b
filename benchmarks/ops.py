"""Time eager mode's ops, ATen's kernel and ours: ``python -m benchmarks.ops --ops softmax,gelu``.

Each call is checked for right numbers first, and then both are timed in turns in one process:
device time (``--mode kernel``), the host's (``host``), or that of steady calls (``call``), which is
what the defaults of eager mode follow: ``--write-table`` writes those into
``gems_compile/defaults/``. With FlagGems installed, its kernels are timed too, in another process.

On several GPUs: a process a GPU with ``--part 1/4 --json 1.json`` and so on, and then ``--rows
*.json`` reads what they measured instead of measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from benchmarks.models import append, stamp
from benchmarks.op_cases import FAMILIES, Case, chosen, without_cases
from benchmarks.op_timing import MODES, Copies, Setting, measure
from benchmarks.processes import ROOT
from benchmarks.table import Row, number
from gems_compile.calls import varying
from gems_compile.errors import UnknownOp

HEAD = ["op", "size", "eager us", "gems us", "x eager", "x FlagGems", "GB/s", "of a copy"]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    families = ", ".join(FAMILIES)
    add("--ops", default="", help=f"comma list: ops, cases, or families ({families}); default: all")
    add("--mode", default="kernel", choices=MODES, help="see above (default: kernel)")
    add("--dtype", default=None, choices=("bfloat16", "float16", "float32"))
    add("--device", help="default: cuda where there is one, else cpu")
    add("--small", action="store_true", help="tiny shapes, for a CPU with TRITON_INTERPRET=1")
    what = "kernels have sizes as arguments, not constants: all, or the first of each tensor"
    add("--any-sizes", nargs="?", const="all", default="", choices=("all", "first"), help=what)
    add("--seconds", type=float, default=0.2, help="of timing, per case and side (default: 0.2)")
    add("--no-flag-gems", action="store_true", help="leave FlagGems out, where it is installed")
    add("--json", type=Path, help="write all rows to this file, a line each until all are there")
    add("--part", default=(1, 1), type=part, help="K/N: the K-th of N shares of the cases")
    add("--rows", nargs="+", type=Path, help="report what such files hold, and measure nothing")
    where = "append each row here (default: results/ops.jsonl, nowhere with --small)"
    add("--results", type=Path, help=where)
    where = "draw x eager as bars, .svg or .png (default: results/ops.svg, nowhere with --small)"
    add("--plot", type=Path, help=where)
    add(
        "--write-table",
        action="store_true",
        help="write what measured faster into gems_compile/defaults/; takes --mode call, or kernel "
        "with --any-sizes, which then adds to the ops that are there",
    )
    add("--list", action="store_true", help="print the cases, and the ops that have none")
    options = parser.parse_args(argv)
    wanted = "kernel" if options.any_sizes else "call"
    if options.write_table and options.mode != wanted:
        what = " with --any-sizes" if options.any_sizes else ""
        parser.error(f"--write-table{what} takes --mode {wanted}, not {options.mode}: see --help")
    return options


def part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)"""
    first, _, count = text.partition("/")
    found = int(first), int(count)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(text)
    return found


def setting_of(options: argparse.Namespace) -> Setting:
    """A CPU computes in float32: its float16 and bfloat16 are emulated."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    return Setting(options.mode, dtype, device, options.seconds, options.small, options.any_sizes)


def machine(device: str) -> dict[str, str]:
    """What a row says of where it was measured."""
    from gems_compile.config import vendor
    from gems_compile.kernels.target import current_target

    target = current_target(vendor())
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "gpu": name,
        "target": "none" if target is None else target.label,
        "torch": torch.__version__,
    }


# FlagGems -----------------------------------------------------------------------------------------


def add_flag_gems(rows: list[Row], setting: Setting) -> str:
    """Put FlagGems' times beside those of the rows that have any; what became of it."""
    names = [row["case"] for row in rows if row["status"] == "ok"]
    task = {"cases": names, **asdict(setting)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.op_timing", json.dumps(task)],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    by_case = {row.pop("case"): row for row in found}
    for row in rows:
        row.update(by_case.get(row["case"], {}))
        if "flag_gems_us" in row:
            row["over_flag_gems"] = row["flag_gems_us"] / row["beside_us"]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return f"FlagGems ended with status {done.returncode}: {last}"
    return f"FlagGems: {sum('flag_gems_us' in row for row in found)} of {len(names)} cases timed"


def has_flag_gems() -> bool:
    from importlib.util import find_spec

    return find_spec("flag_gems") is not None


# a report -----------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        short = row["status"].partition(":")[0]  # the reason is printed below the table
        return [row["op"], row["shape"], short, *[""] * (len(HEAD) - 3)]
    forms = {"eager_us": ".2f", "gems_us": ".2f", "ratio": ".2f", "over_flag_gems": ".2f"}
    forms |= {"gbps": ".0f", "of_copy": ".2f"}
    return [row["op"], row["shape"], *(number(row.get(key), form) for key, form in forms.items())]


def report(rows: list[Row]) -> int:
    """Print the table and the means; 1 if a call's numbers were wrong, or it failed."""
    table.show(HEAD, [cells(row) for row in rows])
    for family in FAMILIES:
        timed = [row for row in rows if row["family"] == family and row["status"] == "ok"]
        parts = []
        for key, other in (("ratio", "eager"), ("over_flag_gems", "FlagGems")):
            mean, count = table.geomean(row[key] for row in timed if key in row)
            if count:
                parts.append(f"{mean:.2f} x {other} ({count})")
        if parts:
            print(f"{family}, geometric mean (cases): {', '.join(parts)}")
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['case']}: {row['status']}")
        if "flag_gems" in row:
            print(f"{row['case']}: FlagGems {row['flag_gems']}")
    return int(any(row["status"].startswith(("wrong", "failed")) for row in rows))


def plot(rows: list[Row], path: Path) -> str:
    """Write a bar a case, grouped by family: times ATen's speed; what became of it."""
    rows = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return "no plot: no case was timed"
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    style = {"svg.fonttype": "none", "svg.hashsalt": "gems", "font.size": 8}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
        figure = Figure(figsize=(8, 1 + 0.16 * len(rows)), facecolor="white", layout="constrained")
        draw(figure.subplots(), rows)
        where = ", ".join(str(rows[-1].get(key, "")) for key in ("gpu", "torch", "dtype", "mode"))
        figure.suptitle(f"Times ATen's speed: {where}")
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, format=path.suffix.removeprefix(".") or "svg", metadata=metadata)
    return f"plot: {path}"


def draw(axes: Any, rows: list[Row]) -> None:
    """Horizontal bars from top to bottom, a colour a family, which begin at ATen's speed."""
    for k, family in enumerate(FAMILIES):
        places = [n for n, row in enumerate(rows) if row["family"] == family]
        if places:
            widths = [rows[n]["ratio"] - 1 for n in places]
            axes.barh(places, widths, left=1, height=0.7, color=f"C{k}", label=family)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log", base=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=5)


# all of it ----------------------------------------------------------------------------------------


def add_kernel_ratios(rows: list[Row], found: Iterable[Case], setting: Setting) -> None:
    """Put how our kernels did on the device beside what the calls did."""
    on_device = replace(setting, mode="kernel")
    copies = Copies(on_device)
    for row, case in zip(rows, found, strict=True):
        if row["status"] == "ok":
            again = measure(case, on_device, copies)
            if "ratio" in again:
                row["kernel_ratio"] = again["ratio"]


def run(
    found: Iterable[Case], setting: Setting, where: dict[str, str], file: Path | None = None
) -> list[Row]:
    """All rows, each printed as it comes, and added to the file."""
    copies, common, rows = Copies(replace(setting, mode="kernel")), {**where, **stamp()}, []
    if file is not None:
        file.write_text("")
    for case in found:
        row = {**measure(case, setting, copies), **common}
        text = row["status"]
        if text == "ok":
            text = f"{row['eager_us']:.2f} / {row['gems_us']:.2f} us = {row['ratio']:.2f}"
        print(f"{case.name}: {text}", flush=True)
        rows.append(row)
        if file is not None:
            append(row, file)
    return rows


def read(files: Iterable[Path], setting: Setting, found: Iterable[Case]) -> list[Row]:
    """The rows of a mode that such files hold, in the order of the cases; those of calls learn from
    those of kernels how they did on the device."""
    mode = setting.mode
    places = {case.name: place for place, case in enumerate(found)}
    rows: list[Row] = []
    for file in files:
        text = file.read_text()
        whole = text.lstrip().startswith("[")
        rows += json.loads(text) if whole else map(json.loads, text.splitlines())
    alike = lambda row: (row.get("any_sizes") or "") == setting.any_sizes  # noqa: E731
    rows = [row for row in rows if row["case"] in places and alike(row)]
    on_device = {row["case"]: row for row in rows if row["mode"] == "kernel"}
    picked = [row for row in rows if row["mode"] == mode]
    for row in picked:
        if mode == "call" and "ratio" in (there := on_device.get(row["case"], {})):
            row.setdefault("kernel_ratio", there["ratio"])
    return sorted(picked, key=lambda row: places[row["case"]])


def measured(
    found: list[Case], setting: Setting, where: dict[str, str], options: argparse.Namespace
) -> list[Row]:
    first, count = options.part
    found = found[first - 1 :: count]
    rows = run(found, setting, where, options.json)
    if options.write_table and not options.any_sizes:
        add_kernel_ratios(rows, found, setting)
    if has_flag_gems() and not options.no_flag_gems:
        print(add_flag_gems(rows, setting))
    return rows


def show_list(found: list[Case]) -> None:
    table.show(
        ["case", "family", "elements"],
        [[case.name, case.family, str(case.elements())] for case in found],
    )
    for name in without_cases():
        print(f"no case: {name}")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        found = chosen(options.ops, options.small)
    except UnknownOp as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        show_list(found)
        return 0
    setting = setting_of(options)
    if setting.any_sizes:
        varying.OWN_SIZES, varying.AT_ONCE = 0, setting.any_sizes
    if options.rows:
        rows = read(options.rows, setting, found)
        if not rows:
            print(f"--rows: no row of mode {setting.mode} there", file=sys.stderr)
            return 2
        where = {key: rows[0][key] for key in ("gpu", "target", "torch")}
    else:
        where = machine(setting.device)
        rows = measured(found, setting, where, options)
    sink = options.results or (None if options.small else ROOT / "results" / "ops.jsonl")
    for row in rows:
        append(row, sink)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    status = report(rows)
    drawing = options.plot or (None if options.small else ROOT / "results" / "ops.svg")
    if drawing:
        print(plot(rows, drawing))
    if options.write_table:
        from benchmarks.op_defaults import write, write_any_sizes

        which = setting.any_sizes
        print(f"table: {write_any_sizes(rows, where, which) if which else write(rows, where)}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
