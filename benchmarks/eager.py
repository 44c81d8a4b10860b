"""Eager mode: whole models with compilation off, with our kernels behind PyTorch and without.

``python -m benchmarks.eager --models vit-b16-inference,gpt2-train`` times both in turns in one
process, with the default selection of ``gems_compile.enable()``. The models are compiled ones
under ``torch.compiler.set_stance("force_eager")``: what a user has who turns compilation off.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import gems_compile
from benchmarks import table, timing
from benchmarks.cases import CASES, missing, names
from gems_compile.eager import stats

ROUNDS = 5


def served() -> dict[str, int]:
    """Calls that our kernels have served so far, by op."""
    return {name: row["ours"] for name, row in stats().items()}


def measure(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Median ms of a step in each state, over rounds that take turns."""
    case = CASES[name].build(getattr(torch, args.dtype), device, args.small, True)
    run = torch.compile(case.model, backend="gems")
    times: dict[str, list[float]] = {"eager": [], "enabled": []}
    calls: dict[str, int] = {}
    for _ in range(ROUNDS):
        for kind, found in times.items():
            switch = gems_compile.enable if kind == "enabled" else gems_compile.disable
            switch()
            case.reset()
            case.step(run)
            before = served()
            case.step(run)
            calls = calls or {k: n - before[k] for k, n in served().items() if n > before[k]}
            timed = timing.measure(
                lambda: case.step(run),
                device,
                min_seconds=args.seconds / ROUNDS,
                prepare=case.reset,
                max_batch=case.max_batch,
            )
            found.append(timed.median_ms)
    gems_compile.disable()
    medians = {f"{kind}_ms": statistics.median(found) for kind, found in times.items()}
    return {"model": name, "dtype": args.dtype, **medians, "served": calls}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eager", description=__doc__)
    parser.add_argument("--models", default="vit-b16,bert-base,gpt2-train")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    args = parser.parse_args(argv)
    device, rows = torch.device(args.device), []
    with torch.compiler.set_stance("force_eager"):
        for name in names(args.models):
            if missing(CASES[name].package):
                print(f"{name}: {missing(CASES[name].package)}")
                continue
            rows.append(measure(name, device, args))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    head = ["model", "eager ms", "enabled ms", "eager / enabled", "calls served"]
    lines = [
        [
            row["model"],
            f"{row['eager_ms']:.3f}",
            f"{row['enabled_ms']:.3f}",
            f"{row['eager_ms'] / row['enabled_ms']:.2f}",
            ", ".join(f"{op} {n}" for op, n in row["served"].items()) or "-",
        ]
        for row in rows
    ]
    table.show(head, lines)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
