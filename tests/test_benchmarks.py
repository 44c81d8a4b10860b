"""What the benchmarks call accurate enough."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from eagercheck import nothing_left  # noqa: F401
from helpers import DEVICE

table = pytest.importorskip("benchmarks.table", reason="the benchmarks are not installed")
host = pytest.importorskip("benchmarks.host")
models = pytest.importorskip("benchmarks.models")


attention = pytest.importorskip("benchmarks.attention")


def rows(**gems: Any) -> list[dict[str, Any]]:
    eager = {"backend": "eager", "error": 0.01, "grad_error": 0.01}
    shared = {"model": "m", "status": "ok"}
    return [{**shared, **eager}, {**shared, "backend": "gems", **gems}]


def test_a_model_that_ran_as_aten_is_told() -> None:
    row = {"model": "m", "backend": "gems", "failures": ["KeyError: v1"]}
    other = {"model": "m", "backend": "inductor"}
    assert models.fallbacks([row, other]) == ["m through gems: ran as ATen: KeyError: v1"]


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


def test_a_short_soak() -> None:
    soak = pytest.importorskip("benchmarks.soak")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = soak.soak(8.0, ["default"], device, seed=0)
    assert found["turns"] > 0 and found["worst"] <= soak.WORST
    assert not [f for f in found["failures"] if "error" in f]


def test_growth_is_seen() -> None:
    soak = pytest.importorskip("benchmarks.soak")
    flat = [soak.Memory(at, {"allocated": 10 * 2**20}) for at in range(100)]
    leaking = [soak.Memory(at, {"allocated": 2**20 * (10 + at)}) for at in range(100)]
    assert soak.growth(flat, 100) == []
    assert soak.growth(leaking, 100) == ["allocated memory: 49.0 -> 109.0 MiB"]
    assert soak.growth(flat[:10], 100) == ["too few turns to tell whether memory grows"]


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU its cases are large")
def test_attention_is_timed(tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    """Forward and backward, of ours and of ATen's, and how far both are from float64."""
    monkeypatch.setattr(attention.timing, "MIN_STEPS", 1)
    monkeypatch.setattr(attention.timing, "BATCH_SECONDS", 0.0)
    out = tmp_path / "rows.json"
    how = ["--small", "--seconds", "0.01", "--dtype", "float32", "--json", str(out)]
    assert attention.main(how) == 0
    found = json.loads(out.read_text())["rows"]
    assert {(r["side"], r["backward"]) for r in found} == {
        (side, back) for side in ("cpu", "cpu, gems") for back in (False, True)
    }
    assert len(found) == 8 and all(r["ms"] > 0 and r["error"] < 5e-6 for r in found)
    assert "was ATen's" not in capsys.readouterr().out
