"""What the benchmarks call accurate enough."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

table = pytest.importorskip("benchmarks.table", reason="the benchmarks are not installed")
host = pytest.importorskip("benchmarks.host")


def rows(**gems: Any) -> list[dict[str, Any]]:
    eager = {"backend": "eager", "error": 0.01, "grad_error": 0.01}
    shared = {"model": "m", "status": "ok"}
    return [{**shared, **eager}, {**shared, "backend": "gems", **gems}]


@pytest.mark.parametrize(
    ("dtype", "gems", "missed"),
    [
        ("bfloat16", {"error": 0.012}, []),
        ("bfloat16", {"error": 0.0121}, ["error"]),
        ("bfloat16", {"error": 0.01, "grad_error": 0.02}, ["grad error"]),
        ("bfloat16", {"error": math.nan}, ["error"]),
        ("float32", {"error": 1e-6, "error_vs_eager": 1e-4}, []),
        ("float32", {"error": 1e-6, "error_vs_eager": 1.1e-4}, ["error"]),
        ("float32", {"error": 1e-6, "error_vs_eager": math.nan}, ["error"]),
        # gradients: near eager's, or as near to float64 as eager's are
        ("float32", {"grad_error": 0.5, "grad_error_vs_eager": 1e-5}, []),
        ("float32", {"grad_error": 0.012, "grad_error_vs_eager": 0.01}, []),
        ("float32", {"grad_error": 0.013, "grad_error_vs_eager": 0.01}, ["grad error"]),
        ("float32", {"grad_error": math.nan, "grad_error_vs_eager": math.nan}, ["grad error"]),
    ],
)
def test_misses(dtype: str, gems: dict[str, float], missed: list[str]) -> None:
    found = table.misses(rows(**gems), "gems", dtype)
    assert [line.split(": ")[1].split(" of ")[0] for line in found] == missed


def test_a_failed_row_is_no_miss() -> None:
    assert not table.misses(rows(status="failed: oom", error=1.0), "gems", "bfloat16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches are timed on a GPU")
def test_what_a_launch_costs() -> None:
    costs = host.launch_costs()
    assert {name.split(",")[0] for name in costs} == {"native", "python", "driver"}
    assert all(0.1 < cost < 1000 for cost in costs.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches are timed on a GPU")
def test_what_a_call_costs() -> None:
    costs = host.call_costs(["gems", "aot_eager"])
    assert set(costs) == {
        f"{n}, {b}" for n in ("view", "add", "chain") for b in ("gems", "aot_eager")
    }
    assert all(0.1 < cost < 100_000 for cost in costs.values())
