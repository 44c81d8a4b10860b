"""Rows of measurements -> a table, geometric means, and what misses its target."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

ERROR_FACTOR = 1.2  # of eager's own error against float32
FLOAT32_ERROR = 1e-4


def index(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row["model"], row["backend"]): row for row in rows}


def ratio(rows: dict[tuple[str, str], Row], model: str, key: str, top: str, bottom: str) -> float:
    """``rows[top][key] / rows[bottom][key]``; NaN where one was not measured."""
    above = rows.get((model, top), {}).get(key)
    below = rows.get((model, bottom), {}).get(key)
    return above / below if above is not None and below else math.nan


def speed(rows: dict[tuple[str, str], Row], model: str, other: str, backend: str) -> float | None:
    """How many times as fast as ``other``, or None."""
    times = ratio(rows, model, "ms", other, backend)
    return None if math.isnan(times) else times


def geomean(values: Iterable[float]) -> tuple[float, int]:
    """Geometric mean of the measured values, and how many there were."""
    logs = [math.log(value) for value in values if value > 0 and math.isfinite(value)]
    return (math.exp(sum(logs) / len(logs)), len(logs)) if logs else (math.nan, 0)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(row: Row, rows: dict[tuple[str, str], Row], against: list[str]) -> list[str]:
    """One line of the table."""
    model, backend = row["model"], row["backend"]
    if row["status"] != "ok":
        short = row["status"].partition(":")[0]  # the reason is printed below the table
        return [model, backend, short, *[""] * (len(header(against)) - 3)]
    star = "*" if row.get("error_without_dropout") else ""
    error, grad, same = (
        number(row.get(key), ".1e") for key in ("error", "grad_error", "error_vs_eager")
    )
    counts = [row.get(name) for name in ("kernels", "launches", "aten_calls", "graphs")]
    return [
        model,
        backend,
        number(row["ms"], ".3f"),
        *(
            number(speed(rows, model, other, backend), ".2f") if other != backend else ""
            for other in against
        ),
        number(row.get("compile_s"), ".1f"),
        number(row.get("peak_mib"), ".0f"),
        error + star if error != "-" else error,
        grad + star if grad != "-" else grad,
        same + star if same != "-" else same,
        *("-" if count is None else str(count) for count in counts),
    ]


def header(against: list[str]) -> list[str]:
    ratios = [f"x {other}" for other in against]
    errors = ["error", "grad error", "vs eager"]
    rest = ["compile s", "peak MiB", *errors, "kernels", "launches", "ATen", "graphs"]
    return ["model", "backend", "ms", *ratios, *rest]


def plain(head: list[str], lines: list[list[str]]) -> str:
    """Aligned text: the first two columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    out = []
    for line in [head, *lines]:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(padded).rstrip())
    out.insert(1, "-" * max(map(len, out)))
    return "\n".join(out)


def show(head: list[str], lines: list[list[str]]) -> None:
    """Print with rich where it is installed, else as plain text."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(head, lines))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for line in lines:
        table.add_row(*line)
    # a pipe has no width of its own, and 80 columns would break the numbers
    wide = len(plain(head, lines).splitlines()[1]) + 2 * len(head)
    width = max(shutil.get_terminal_size((0, 0)).columns, wide)
    Console(width=width, highlight=False, markup=False).print(table)


def means(rows: list[Row], backends: list[str], dtype: str) -> list[str]:
    """Per backend, geometric means of speed, compile time and memory against the others."""
    table, models = index(rows), list(dict.fromkeys(row["model"] for row in rows))
    kinds = {
        "speed": ("ms", False),
        "cold compile time": ("compile_s", True),
        "peak memory": ("peak_mib", True),
    }
    lines = []
    for backend in (name for name in backends if name != "eager"):
        for other in (name for name in backends if name != backend):
            parts = []
            for kind, (key, upright) in kinds.items():
                pair = (backend, other) if upright else (other, backend)
                values = [ratio(table, model, key, *pair) for model in models]
                mean, count = geomean(values)
                if count:
                    parts.append(f"{kind} {mean:.2f}x ({count})")
            if parts:
                lines.append(f"{backend} / {other}, geomean (models), {dtype}: " + ", ".join(parts))
    return lines


def misses(rows: list[Row], backend: str, dtype: str) -> list[str]:
    """Where ``backend`` is less accurate than it should be; a NaN is always a miss.

    In a low precision: more than 1.2 times eager's own error against float32. In float32: outputs
    more than 1e-4 from eager's; gradients too, unless they are about as near to float64 as eager's
    (of a deep network with batch norm, eager's own are 1e-3 away from it).
    """
    table, found = index(rows), []
    for row in rows:
        if row["backend"] != backend or row["status"] != "ok":
            continue
        eager = table.get((row["model"], "eager"), {})
        for key in ("error", "grad_error"):
            what = f"{row['model']}: {key.replace('_', ' ')} of {backend}"
            value, its, near = row.get(key), eager.get(key), row.get(f"{key}_vs_eager")
            if value is None:
                continue
            relative = its is not None and value <= ERROR_FACTOR * its
            close = near is not None and near <= FLOAT32_ERROR
            if dtype == "float32" and not (close or (key == "grad_error" and relative)):
                found.append(
                    f"{what} {number(near, '.2e')} from eager, at most {FLOAT32_ERROR:.2e}; "
                    f"{value:.2e} from float64 (eager {number(its, '.2e')})"
                )
            elif dtype != "float32" and not relative and (its is not None or math.isnan(value)):
                limit = None if its is None else ERROR_FACTOR * its
                found.append(
                    f"{what} {value:.2e}, at most {number(limit, '.2e')} "
                    f"(eager {number(its, '.2e')})"
                )
    return found
