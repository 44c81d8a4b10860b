"""The ranges that a profiler sees of a compiled function."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers import DEVICE, gems_only
from test_runs import two_scales

from gems_compile.backend import Gems
from gems_compile.insight.summary import summarize

pytestmark = gems_only


def spans(seen: torch.profiler.profile, name: str) -> list[tuple[float, float]]:
    """Starts and ends of the host's ranges whose names contain ``name``."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if name in event.name and event.device_type == torch.autograd.DeviceType.CPU
    ]


def test_the_call_and_its_launches_have_ranges() -> None:
    backend = Gems()
    compiled = torch.compile(two_scales, backend=backend, fullgraph=True)
    x = torch.randn(64, 64, device=DEVICE)
    wanted = compiled(x)
    (report,) = backend.reports
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        got = compiled(x)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    ((start, end),) = spans(seen, "gems 0_inference")
    launches = [launch.name for run in report.runs for launch in run.launches]
    assert len(launches) > 1
    for name in set(launches):
        found = spans(seen, name)
        assert len(found) == launches.count(name)
        assert all(start <= first <= last <= end for first, last in found)


def test_a_call_without_a_profiler_makes_no_ranges(monkeypatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    compiled = torch.compile(two_scales, backend="gems", fullgraph=True)
    compiled(torch.randn(64, 64, device=DEVICE))


def test_training_and_other_sizes() -> None:
    backend = Gems()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sum(y.sum() for y in two_scales(x))

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for rows in (32, 48):
        x = torch.randn(rows, 64, device=DEVICE, requires_grad=True)
        (wanted,) = torch.autograd.grad(loss(x), x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            (got,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(got, wanted)
        assert spans(seen, "gems 0_forward") and spans(seen, "gems 0_backward")


def test_a_trace_has_the_names_that_the_plan_has(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.GELU(), torch.nn.LayerNorm(16)).to(DEVICE)
    backend, x = Gems(), torch.randn(4, 16, device=DEVICE)
    compiled = torch.compile(model, backend=backend)
    compiled(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        compiled(x).sum().backward()
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    seen_ranges = [e for e in events if e.get("cat") == "user_annotation"]
    ranges = [e["name"] for e in sorted(seen_ranges, key=lambda e: e["ts"])]  # of two threads
    graphs = [summarize(report) for report in backend.reports]
    launched = [c.name for g in graphs for c in g.calls if c.kind == "kernel"]
    assert sorted(n for n in ranges if n.startswith("fused_")) == sorted(launched)
    assert "fused_gelu_sum_div_sub_mul_add_rsqrt" in launched  # what docs/dumps.md calls readable
    assert [n for n in ranges if n.startswith("gems ")] == ["gems 0_forward", "gems 0_backward"]
