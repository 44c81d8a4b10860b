"""The benchmark of fused groups: its declarations, its rows, what it calls a miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

bench = pytest.importorskip("benchmarks.groups", reason="the benchmarks are not installed")
worker = pytest.importorskip("benchmarks.group_worker")
spec = pytest.importorskip("benchmarks.group")

GROUPS, CPU = worker.GROUPS, torch.device("cpu")
TASK = {"small": True, "seconds": 0.0}


class Traffic(TorchDispatchMode):
    """Counts the bytes that eager mode's ops read and write; a view moves none."""

    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = any(argument.alias_info for argument in func._schema.arguments)
        if func._schema.is_mutable or not aliases:
            # _foreach_mul_ returns nothing, and writes its first argument
            written = out if out is not None else args[0]
            self.moved += sum(x.nbytes for x in worker.tensors([args, kwargs, written]))
        return out


def traffic(group: Any, device: torch.device, small: bool) -> int:
    given = worker.Given.make(group, device, small)
    step = worker.Step(group, given, lambda fn: fn)
    with Traffic() as seen:
        step.run()
    return seen.moved


def test_there_are_enough_groups_in_every_class() -> None:
    assert len(GROUPS) >= 45
    assert set(bench.COPIES) <= set(GROUPS)
    assert all(name == group.name for name, group in GROUPS.items())
    assert {group.target for group in GROUPS.values()} == set(spec.TARGETS)
    assert {group.step for group in GROUPS.values()} == set(spec.STEPS)


@pytest.mark.parametrize("name", GROUPS)
def test_least_bytes_are_no_more_than_eager_moves(name: str) -> None:
    """At both sizes; the full one without memory."""
    group = GROUPS[name]
    assert 0 < group.least_bytes(small=True) <= traffic(group, CPU, small=True)
    if not name.startswith("clip_grad_norm"):  # whose foreach refuses meta tensors
        assert 0 < group.least_bytes() <= traffic(group, torch.device("meta"), small=False)


@pytest.mark.parametrize("name", GROUPS)
def test_eager_is_near_its_reference(name: str) -> None:
    subject = worker.Subject.of(GROUPS[name], CPU, small=True)
    assert len(subject.eager) == len(subject.wanted) > 0
    assert worker.worst(subject.eager) < 0.01


@pytest.mark.parametrize(
    "name",
    [
        "rms_norm-8192x8192",
        "layer_norm-8192x8192-backward",
        "dropout_add_layer_norm-8192x4096",
        "cross_entropy-8192x50257-train",
        "swiglu-8192x14336-backward",
        "quantize-8192x4096",
        "kv_cache-64x1x4096x8x128",
        "batch_norm-64x256x56x56",
        "adamw-24x2048",
    ],
)
def test_gems_is_as_accurate_as_eager(name: str) -> None:
    eager, gems = worker.rows(GROUPS[name], ["eager", "gems"], TASK, CPU)
    assert eager["status"] == gems["status"] == "ok"
    assert not eager["inaccurate"]
    assert not gems["inaccurate"]
    assert gems["kernels"] > 0
    assert gems["gb_s"] == gems["bytes"] / gems["us"] / 1e3


def test_a_backend_that_fails_leaves_the_others(capfd: Any) -> None:
    group = GROUPS["softmax-32768x4096"]
    found = list(worker.rows(group, ["nosuch", "eager"], TASK, CPU))
    assert [row["status"].partition(":")[0] for row in found] == ["failed", "ok"]
    assert "nosuch" in found[0]["status"]
    bench.report([{**row, "how": "graph"} for row in found], ["eager", "nosuch"], "nosuch")
    assert "softmax-32768x4096 through nosuch: failed: InvalidBackend" in capfd.readouterr().out


def test_a_wrong_result_is_inaccurate() -> None:
    wanted = [torch.ones(4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    found = [torch.ones(4), torch.tensor([1.0, 1.001])]
    assert worker.accuracy(found, wanted, [0.0, 0.0])["inaccurate"] == [1]
    assert worker.accuracy(found, wanted, [0.0, 1e-3])["inaccurate"] == []
    found[0][2] = torch.nan
    row = worker.accuracy(found, wanted, [0.0, 1e-3])
    assert row["inaccurate"] == [0]
    assert row["error"] != row["error"]


def test_a_process_that_dies_fails_its_row_alone(tmp_path: Any) -> None:
    """One process after the other: the first is killed, the second goes on."""
    task = {**TASK, "device": "cpu", "jobs": 1, "backends": ["eager"], "lock": f"{tmp_path}/lock"}
    pool = bench.Pool(task, 60.0, tmp_path)
    pool.worker().stop()
    pool.idle.put(pool.workers[0])
    groups = ["softmax-32768x4096", "gelu_erf-2^26"]
    first, second = (rows for [rows] in pool.run(groups))
    assert first["status"].startswith("failed: killed")
    assert second["status"] == "ok"
    assert second["how"] == "wall"


def test_a_call_costs_the_difference_of_two_graphs(monkeypatch: Any) -> None:
    """Of a device on which a flush takes 0.06 ms and the call 0.25 ms."""
    timing = pytest.importorskip("benchmarks.group_timing")
    costs = {"flush": 0.06, "run": 0.25}

    class Graph:
        def __init__(self, *bodies: str) -> None:
            self.replay = "+".join(bodies)

    def elapsed_ms(*bodies: str) -> list[float]:
        return [sum(costs[part] for part in body.split("+")) for body in bodies]

    monkeypatch.setattr(timing, "captured", Graph)
    monkeypatch.setattr(timing, "elapsed_ms", elapsed_ms)
    row = timing.graph_us("run", "flush", seconds=0.0)
    assert row["us"] == pytest.approx(250.0)
    costs["run"] = 9.0  # longer than what a graph should take: one call
    assert timing.graph_us("run", "flush", seconds=0.0)["us"] == pytest.approx(9000.0)
    costs["run"] = -0.01  # as where another program ran beside the second graph
    with pytest.raises(RuntimeError, match="the GPU is busy"):
        timing.graph_us("run", "flush", seconds=0.0)


def test_a_random_call_costs_the_difference_of_two_queues(monkeypatch: Any) -> None:
    """Of the same device, and a CPU that is in time behind four flushes."""
    timing = pytest.importorskip("benchmarks.group_timing")
    costs = {"flush": 0.06, "run": 0.25}
    seen = []

    def queued_ms(bodies: list[str], flush: str, ahead: int) -> tuple[float, int]:
        seen.append(ahead)
        return sum(costs[part] for part in bodies), 4

    monkeypatch.setattr(timing, "elapsed_ms", lambda run: [costs[run]])
    monkeypatch.setattr(timing, "queued_ms", queued_ms)
    assert timing.queued_us("run", "flush", seconds=0.0)["us"] == pytest.approx(250.0)
    assert seen[0] == 1 and set(seen[1:]) == {4}


def made_up(group: str, backend: str, us: float, **more: Any) -> Any:
    """A row as a GPU would give it."""
    least = GROUPS[group].least_bytes()
    shared = {"status": "ok", "how": "graph", "error": 1e-3, "eager_error": 1e-3, "inaccurate": []}
    found = {"group": group, "backend": backend, "us": us, "gb_s": least / us / 1e3, "bytes": least}
    return {**found, "target": GROUPS[group].target, **shared, **more}


def test_table_and_misses(capsys: Any) -> None:
    slow, fast, loss = "rms_norm-8192x8192", "swiglu-8192x14336", "cross_entropy-8192x50257-train"
    rows = [
        made_up("copy-2^26", "eager", 62.0),
        made_up("copy-2^28", "eager", 246.0),
        made_up(slow, "gems", 80.0, kernels=1, inaccurate=[0]),
        made_up(slow, "inductor", 70.0, how="profiler", kernels=1),
        made_up(fast, "gems", 165.0, kernels=1),
        made_up(fast, "inductor", 165.0),
        made_up(loss, "gems", 500.0),
        {"group": loss, "backend": "inductor", "status": "failed: RuntimeError: no"},
    ]
    assert bench.report(rows, ["gems", "inductor"], "gems") == 1
    out = capsys.readouterr().out
    assert "copy-2^26: 62.0 us, 4330 GB/s" in out
    assert "gems / inductor, geomean (groups): 0.94x (2)" in out
    assert f"misses its target: {slow}: 0.78 of copy, row at least 0.90" in out
    assert f"misses its target: {slow}: 0.88x inductor, at least 0.97x" in out
    assert "misses its target: geometric mean: 0.94x inductor, at least 1.15x" in out
    assert f"misses its target: {fast}" not in out
    assert f"not accurate enough: {slow}: 1.00e-03 (eager 1.00e-03), results 0" in out
    assert "~70.0" in out
    assert "1.0e-03!" in out
    loss_rows = [*rows[:-1], made_up(loss, "inductor", 700.0)]
    assert f"{loss}: 1.40x inductor, at least 1.50x" in "\n".join(bench.misses(loss_rows, "gems"))


def test_a_share_is_of_a_copy_of_as_many_bytes() -> None:
    """Between, below and above what is timed."""
    rows = [made_up("copy-2^20", "eager", 5.0), made_up("copy-2^22", "eager", 8.0)]
    found = bench.index(rows)
    small = rows[0]["bytes"]
    times = [bench.copy_us(found, size) for size in (small // 2, small, small * 2, small * 8)]
    assert times == pytest.approx([4.5, 5.0, 6.0, 12.0])
    assert bench.share(found, {"bytes": small * 2, "us": 12.0}) == pytest.approx(0.5)
    assert bench.share(bench.index(rows[:1]), rows[0]) is None


def test_groups_are_named_by_their_beginnings(capsys: Any) -> None:
    assert bench.names("softmax-8192,copy") == [
        "softmax-8192x65536",
        "softmax-8192x65536-backward",
        *bench.COPIES,
    ]
    assert bench.names(None) == list(GROUPS)
    assert bench.main(["--list", "--groups", "adamw"]) == 0
    assert "adamw-24x2048" in capsys.readouterr().out
    assert bench.main(["--groups", "softmx"]) == 2
