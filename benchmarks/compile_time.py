"""Time compiles, cold and warm: ``python -m benchmarks.compile_time --against aot_eager,inductor``.

Each (model, backend) is compiled in a fresh process with empty caches (cold), then in a second one
that finds the caches of the first (warm), one at a time. One small compile a backend comes before
all of them and does not count: it reads the libraries from disk. Backends take turns, ``--cold``
and ``--warm`` of each, and the median counts: Dynamo's own seconds differ by 0.5 s from one to the
next, and aot_eager took 6.7 to 10.8 s for ResNet-50's training on one H100's host. aot_eager,
torch's own backend that decomposes and generates nothing, is the floor: Dynamo and AOTAutograd.
Besides the models of ``benchmarks.models``, Llama-3.2-1B with 2, 16 and 64 layers shows how seconds
grow with the graph.

A long run can be split by --models and --layers ("" is none): rows are appended to a file, and
``--report`` prints and plots the newest of all that were measured like the last one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.models import add_shared, append, stamp
from benchmarks.processes import ROOT, measured
from benchmarks.table import Row, number

STARTS = ("cold", "warm")
FLOOR, REFERENCE = "aot_eager", "inductor"

# targets
MOST_OF_REFERENCE = 0.4  # of Inductor's cold seconds, geometric mean
MOST_OVER_FLOOR_S = 3.0
MOST_MS_A_NODE = 0.25  # gems' own Python
WARM_OF_REFERENCE = 1.0  # of Inductor's warm seconds, every model
WARM_OF_DYNAMO, WARM_MORE_S = 1.2, 1.0  # times Dynamo's own seconds, and seconds on top
DEEP, SHALLOW, MOST_DEEPER = 64, 16, 4.2  # layers, and how many times the seconds

TORCH_STAGES = ("Dynamo", "entry", "AOT", "compiler", "rest")
GEMS_STAGES = ("passes", "translate", "fuse", "emit", "wrapper", "load", "triton", "bind")
COUNTS = ("nodes", "calls", "kernels", "launches")
SHARES = ("own_ms_a_node", "own_ms_a_call")
COLOURS = ("#0b5fa5", "#b3500b", "#555555", "#2e7d32", "#7b3294")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", default="2,16,64", help="comma list of Llama depths (default: 2,16,64)")
    add("--against", default=f"{FLOOR},{REFERENCE}", help="comma list of backends")
    for start, times in (("cold", 1), ("warm", 3)):
        what = f"{start} compiles of each; the median counts (default: {times})"
        add(f"--{start}", type=int, default=times, help=what)
    add("--report", action="store_true", help="measure nothing; show what --results holds")
    where = "append each row here (default: results/compile_time.jsonl, nowhere with --small)"
    add("--results", type=Path, help=where)
    where = "draw seconds against layers (default: results/compile_time.svg, nowhere with --small)"
    add("--plot", type=Path, help=where)
    add_shared(parser)
    options = parser.parse_args(argv)
    if not options.small:
        options.results = options.results or ROOT / "results" / "compile_time.jsonl"
        options.plot = options.plot or ROOT / "results" / "compile_time.svg"
    for start in STARTS:
        if getattr(options, start) < 1:
            parser.error(f"--{start} {getattr(options, start)}: at least 1")
    if options.report and not (options.results and options.results.exists()):
        parser.error(f"--report: no results in {options.results}")
    try:
        options.cases = cases(options)
    except ValueError as error:
        parser.error(str(error))
    if not (options.report or options.cases):
        parser.error("nothing to compile: --models and --layers are both empty")
    return options


def cases(options: argparse.Namespace) -> list[str]:
    """The cases to compile: those of --models, then the Llamas of --layers."""
    from benchmarks.cases import names

    layered = [
        f"llama-{int(layers)}-layers-{kind}"
        for layers in options.layers.split(",")
        if layers.strip()
        for kind in ("inference", "train")
    ]
    return list(dict.fromkeys([*names(options.models), *layered]))


def backends(options: argparse.Namespace) -> list[str]:
    against = [name for name in options.against.split(",") if name not in ("", "eager")]
    return list(dict.fromkeys([options.backend, *against]))


def tasks(options: argparse.Namespace, caches: Path) -> list[dict[str, Any]]:
    """Cold and warm compiles of every model through every backend, each of which is rehearsed."""
    shared = {name: getattr(options, name) for name in ("dtype", "small", "device")}
    turns = [("cold", turn) for turn in range(options.cold)]
    turns += [("warm", 0)] * options.warm  # each with what the first cold one left
    counted = [
        {
            "worker": "benchmarks.compile_worker",
            "model": model,
            "backend": backend,
            "start": start,
            "caches": str(caches / f"{model}-{backend}-{turn}".replace(":", "-")),
            **shared,
        }
        for model in options.cases
        for start, turn in turns
        for backend in backends(options)
    ]
    return counted if options.small else [*rehearsals(counted, caches), *counted]


def rehearsals(counted: list[dict[str, Any]], caches: Path) -> list[dict[str, Any]]:
    """One compile a backend that no row tells of: the first on a machine read torch, Triton and its
    tools from a cold disk, and took 0.5 s longer before AOTAutograd than the next ones."""
    firsts = {task["backend"]: task for task in reversed(counted)}
    caches = caches / "rehearsal"
    return [
        {**task, "small": True, "start": "rehearsal", "caches": str(caches / backend)}
        for backend, task in reversed(firsts.items())
    ]


def median(rows: list[Row]) -> Row:
    """Of the compiles of one case, the one in the middle; one that failed, if any did."""
    for row in rows:
        if row["status"] != "ok":
            return row
    by_time = sorted(rows, key=lambda row: float(row["compile_s"]))
    return {**by_time[len(rows) // 2], "all_s": [row["compile_s"] for row in rows]}


def run(options: argparse.Namespace) -> Iterator[Row]:
    """The rows, each appended to the results as soon as it is there."""
    common, seen = stamp(), defaultdict[tuple[str, str, str], list[Row]](list)
    with tempfile.TemporaryDirectory(prefix="gems-bench-", ignore_cleanup_errors=True) as caches:
        todo = tasks(options, Path(caches))
        for task, row in zip(todo, measured(todo, options.jobs, options.timeout), strict=True):
            keys = ("model", "backend", "start", "dtype", "small")
            row = {**{key: task[key] for key in keys}, **row, **common}
            found = f"{row['compile_s']:.2f} s" if row["status"] == "ok" else row["status"]
            what = f"{row['model']} {row['backend']} {row['start']}"
            print(f"{what}: {found} [{row['wall_s']} s]", flush=True)
            if row["start"] == "rehearsal":
                continue
            alike = seen[row["model"], row["backend"], row["start"]]
            alike.append(row)
            if len(alike) < getattr(options, row["start"]):
                continue
            row = median(alike)
            append(row, options.results)
            yield row


def alike(path: Path) -> list[Row]:
    """The newest row of each case in a results file, of those that share device, software, dtype
    and commit with the last one; a row without a device (out of time) may be of any."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    last: Row = next((row for row in reversed(rows) if "device" in row), {})
    keys = ("device", "torch", "triton", "dtype", "commit")
    same = [(key, last[key]) for key in keys if key in last]
    newest = {
        (row["model"], row["backend"], row["start"]): row
        for row in rows
        if all(row.get(key, value) == value for key, value in same)
    }
    return list(newest.values())


# what the rows say -------------------------------------------------------------------------------


def of_start(rows: list[Row], start: str) -> dict[tuple[str, str], Row]:
    return table.index(row for row in rows if row["start"] == start)


def against_others(rows: list[Row], row: Row) -> tuple[float, float]:
    """Compile seconds above the floor's, and over Inductor's; NaN where one is not known."""
    found = of_start(rows, row["start"])
    floor = found.get((row["model"], FLOOR), {}).get("compile_s", math.nan)
    ratio = table.ratio(found, row["model"], "compile_s", row["backend"], REFERENCE)
    return row.get("compile_s", math.nan) - floor, ratio


def known(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def overview(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: compile seconds of every row, and what torch tells of their stages."""
    head = ["model", "backend", "start", "compile s", "s over floor", f"/ {REFERENCE}"]
    lines = []
    for row in rows:
        line = [row["model"], row["backend"], row["start"]]
        if row["status"] != "ok":  # the reason is printed below the table
            line.append(row["status"].partition(":")[0])
            lines.append(line + [""] * (len(head) + len(TORCH_STAGES) + 1 - len(line)))
            continue
        over, ratio = against_others(rows, row)
        line += [
            number(row["compile_s"], ".2f"),
            known(over, "+.2f") if row["backend"] != FLOOR else "",
            known(ratio, ".2f") if row["backend"] != REFERENCE else "",
        ]
        line += [known(row["seconds"].get(stage), ".2f") for stage in TORCH_STAGES]
        lines.append([*line, known(row.get("gc_s"), ".2f")])
    return [*head, *TORCH_STAGES, "of it gc"], lines


def inside(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: milliseconds of gems' stages, and what they made of the graphs."""
    stages, shares = [f"{stage} ms" for stage in GEMS_STAGES], [s.replace("_", " ") for s in SHARES]
    head = ["model", "start", *stages, *COUNTS, *shares]
    lines = [
        [
            row["model"],
            row["start"],
            *(known(row["seconds"].get(stage, math.nan) * 1e3, ".0f") for stage in GEMS_STAGES),
            *(str(row[count]) for count in COUNTS),
            *(known(row[share], ".3f") for share in SHARES),
        ]
        for row in rows
        if row["status"] == "ok" and "nodes" in row
    ]
    return head, lines


def means(rows: list[Row], backend: str) -> Iterator[tuple[str, str, float, int]]:
    """Start, other backend, geometric mean of compile seconds over the other's, and of how many."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    for start in STARTS:
        found = of_start(rows, start)
        for other in dict.fromkeys(row["backend"] for row in rows if row["backend"] != backend):
            ratios = [table.ratio(found, name, "compile_s", backend, other) for name in names]
            mean, count = table.geomean(ratios)
            if count:
                yield start, other, mean, count


def deeper(rows: list[Row], backend: str) -> Iterator[tuple[str, float]]:
    """What, and how many times the seconds of 16 layers 64 layers take."""
    for start in STARTS:
        found = of_start(rows, start)
        for kind in ("inference", "train"):
            deep, shallow = (
                found.get((f"llama-{layers}-layers-{kind}", backend), {}).get("compile_s")
                for layers in (DEEP, SHALLOW)
            )
            if deep and shallow:
                yield f"{kind}, {start}", deep / shallow


def misses(rows: list[Row], backend: str) -> list[str]:
    """Where ``backend`` misses a target; what was not measured is no miss."""
    found = []
    for start, other, mean, count in means(rows, backend):
        if (start, other) == ("cold", REFERENCE) and mean > MOST_OF_REFERENCE:
            wanted = f"at most {MOST_OF_REFERENCE}x"
            found.append(f"cold geomean {mean:.2f}x {REFERENCE}'s seconds ({count}), {wanted}")
    for row in rows:
        if row["backend"] != backend or row["status"] != "ok":
            continue
        what, over = f"{row['model']}, {row['start']}", against_others(rows, row)[0]
        if over > MOST_OVER_FLOOR_S:
            found.append(f"{what}: {over:.2f} s over {FLOOR}, at most {MOST_OVER_FLOOR_S} s")
        if row["start"] == "warm":
            found += warm_misses(rows, row)
        own = row.get("own_ms_a_node")
        if own is not None and own > MOST_MS_A_NODE:
            found.append(f"{what}: own Python {own:.3f} ms a node, at most {MOST_MS_A_NODE} ms")
        found += [f"{what}: failed to compile: {text}" for text in row.get("failures", ())]
    for what, times in deeper(rows, backend):
        if times > MOST_DEEPER:
            wanted = f"at most {MOST_DEEPER}x"
            found.append(f"{what}: {DEEP} layers {times:.2f}x of {SHALLOW} layers, {wanted}")
    return found


def warm_misses(rows: list[Row], row: Row) -> list[str]:
    """Where a second process's compile misses a target."""
    what, found = f"{row['model']}, warm", []
    ratio = against_others(rows, row)[1]
    if ratio > WARM_OF_REFERENCE:
        found.append(f"{what}: {ratio:.2f}x {REFERENCE}'s seconds, at most {WARM_OF_REFERENCE}x")
    most = WARM_OF_DYNAMO * row["seconds"].get("Dynamo", math.inf) + WARM_MORE_S
    if row["compile_s"] > most:
        wanted = f"at most {WARM_OF_DYNAMO}x Dynamo's own + {WARM_MORE_S} s"
        found.append(f"{what}: {row['compile_s']:.2f} s, {wanted} ({most:.2f} s)")
    anew = {why: times for why, times in row.get("cache", {}).items() if why != "from the cache"}
    found += [f"{what}: {times} graphs were compiled anew: {why}" for why, times in anew.items()]
    return found


def report(rows: list[Row], backend: str) -> int:
    """Print the tables and what they amount to; 1 if a case failed or a target is missed."""
    table.show(*overview(rows))
    print("compile s: first call less a steady one. entry: from Dynamo's graph to AOTAutograd. gc:")
    print("Python's garbage collections, whose seconds are also in the stages that they stopped.")
    head, lines = inside(rows)
    if lines:
        table.show(head, lines)
        print("own: passes, translate, fuse, emit, wrapper and bind; nodes: all of the ATen graphs")
        print("as AOTAutograd gives them; calls: those of ATen that gems' passes leave in them.")
    for start, other, mean, count in means(rows, backend):
        print(f"{backend} / {other}, geomean (models), {start}: {mean:.2f}x ({count})")
    for what, times in deeper(rows, backend):
        print(f"{backend}, {DEEP} layers / {SHALLOW} layers, {what}: {times:.2f}x")
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['model']} through {row['backend']}, {row['start']}: {row['status']}")
    failed = [row for row in rows if row["status"].startswith("failed")]
    for row in failed:
        print(f"\n{row['model']} through {row['backend']}, {row['start']}:", file=sys.stderr)
        print(row.get("log", "")[-1500:], file=sys.stderr)
    missed = misses(rows, backend)
    for line in missed:
        print("missed: " + line)
    return 1 if failed or missed else 0


# the plot ----------------------------------------------------------------------------------------


def curves(rows: list[Row], kind: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(backend, start) -> (layers, compile seconds), of the Llamas of a kind."""
    from benchmarks.cases import LAYERED

    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        layered = LAYERED.fullmatch(row["model"])
        if layered and layered[2] == kind and row["status"] == "ok":
            points = found.setdefault((row["backend"], row["start"]), [])
            points.append((int(layered[1]), row["compile_s"]))
    return {line: sorted(points) for line, points in found.items()}


def plot(rows: list[Row], path: Path) -> str:
    """Write seconds against layers as SVG, cold solid and warm dashed; what became of it."""
    kinds = [kind for kind in ("inference", "train") if curves(rows, kind)]
    if not kinds:
        return "no plot: no Llama of --layers was compiled"
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    colours = dict(zip(dict.fromkeys(row["backend"] for row in rows), COLOURS * 2, strict=False))
    style = {"svg.fonttype": "none", "svg.hashsalt": "gems", "font.size": 11}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
        figure = Figure(figsize=(5 * len(kinds), 4), facecolor="white", layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            draw(axes, curves(rows, kind), colours)
            axes.set_title(f"Llama-3.2-1B's layers, {kind}")
        device, version = rows[-1].get("device", ""), rows[-1].get("torch", "")
        figure.suptitle(f"Compile time, {device}, torch {version}", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return f"plot: {path}"


def draw(
    axes: Any, lines: dict[tuple[str, str], list[tuple[int, float]]], colours: dict[str, str]
) -> None:
    """The lines of one kind of step: a colour a backend, a dash for warm."""
    for (backend, start), points in lines.items():
        dash = "-" if start == "cold" else "--"
        label = f"{backend}, {start}"
        axes.plot(*zip(*points, strict=True), dash, marker="o", color=colours[backend], label=label)
    axes.set_xticks(sorted({layers for points in lines.values() for layers, _ in points}))
    axes.set_xlabel("layers")
    axes.set_ylabel("compile time, s")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    rows = alike(options.results) if options.report else list(run(options))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    status = report(rows, options.backend)
    if options.plot:
        held = alike(options.results) if options.results else rows
        print(plot(held, options.plot))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
