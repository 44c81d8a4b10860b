"""Rows of ``benchmarks.ops --mode call`` -> a target's table in ``gems_compile/defaults/``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.table import Row
from gems_compile.calls.worth import (
    FOLDER,
    LEAST_ON_DEVICE,
    WITH_DIM,
    Measured,
    Table,
    path_of,
    read_table,
)

HOW = "time of ATen's call over ours, steady calls, host time included"


def measured(rows: Sequence[Row]) -> Measured:
    """What rows of one overload amount to.

    The least size is one from which on, in elements, no call measured slower than ATen's. Of an op
    whose calls are told apart by their dim, those across rows have a least size of their own, and
    rows longer than the longest that gained are ATen's.
    """
    ratios = {row["shape"]: round(row["ratio"], 2) for row in sorted(rows, key=_elements)}
    if rows[0]["op"] not in WITH_DIM:
        return Measured(_least(rows), ratios=ratios)
    along = [row for row in rows if not row["across"]]
    gained = [row for row in along if gains(row)]
    longest = max((_columns(row) for row in gained), default=None)
    if longest is not None and all(_columns(row) <= longest for row in along):
        longest = None
    within = [row for row in along if longest is None or _columns(row) <= longest]
    across = _least([row for row in rows if row["across"]])
    return Measured(_least(within), longest, across, ratios)


def gains(row: Row) -> bool:
    """Whether a call is at least as fast as ATen's, and its kernel no slower: else ATen lost its
    time on the host, which waited for the device, say."""
    return row["ratio"] >= 1 and row.get("kernel_ratio", 1.0) >= LEAST_ON_DEVICE


def _least(rows: Sequence[Row]) -> int | None:
    """Elements of the smallest call that is at least as fast, as are all larger ones."""
    least = None
    for size in sorted({_elements(row) for row in rows}, reverse=True):
        if not all(gains(row) for row in rows if _elements(row) == size):
            break
        least = size
    return least


def _elements(row: Row) -> int:
    return int(row["elements"])


def _columns(row: Row) -> int:
    return int(row["columns"])


def write(rows: Iterable[Row], where: dict[str, str], folder: Path = FOLDER) -> Path:
    """Write the table of this target. Ops without a row keep what is known of them."""
    rows = [row for row in rows if row["status"] == "ok"]
    path = path_of(where["target"], folder)
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
    torch = ".".join(where["torch"].split(".")[:2])
    facts = {
        "target": where["target"],
        "measured": f"{where['gpu']}, torch {torch}, {dtypes}",
        "how": HOW,
    }
    ops = kept(read_table(path), facts["measured"]) if path.exists() else {}
    for op in dict.fromkeys(row["op"] for row in rows):
        ops[op] = measured([row for row in rows if row["op"] == op])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(facts, ops))
    return path


def write_any_sizes(
    rows: Iterable[Row], where: dict[str, str], which: str, folder: Path = FOLDER
) -> Path:
    """Add to this target's table how kernels for any sizes did, ``which`` being arguments."""
    path = path_of(where["target"], folder)
    table = read_table(path)
    ops = dict(table.ops)
    found: dict[str, float] = {}
    for row in rows:
        known = ops.get(row["op"])
        if row["status"] != "ok" or not row["shared"] or known is None or known.least is None:
            continue
        if _elements(row) >= known.least:
            found[row["op"]] = min(row["ratio"], found.get(row["op"], row["ratio"]))
    for op, ratio in found.items():
        ops[op] = replace(ops[op], any_sizes={**ops[op].any_sizes, which: round(ratio, 2)})
    facts = {"target": table.target, "measured": table.measured, "how": table.how}
    path.write_text(text_of(facts, ops))
    return path


def kept(table: Table, now: str) -> dict[str, Measured]:
    """Its rows; each says where it was measured, if that was elsewhere than the new ones."""
    if table.measured == now:
        return dict(table.ops)
    there = f"measured on {table.measured}"
    return {
        op: row if "measured on" in row.note else replace(row, note=_joined(row.note, there))
        for op, row in table.ops.items()
    }


def _joined(*texts: str) -> str:
    return "; ".join(filter(None, texts))


def text_of(facts: dict[str, str], ops: dict[str, Measured]) -> str:
    """A line an op, so that a change of one shows as one."""
    lines = []
    for op in sorted(ops):
        kept = {k: v for k, v in asdict(ops[op]).items() if k == "least" or v not in (None, {}, "")}
        lines.append(f"  {json.dumps(op)}: {json.dumps(kept)}")
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in facts.items())
    return "{\n" + head + ' "ops": {\n' + ",\n".join(lines) + "\n }\n}\n"
