"""Where a step's device time goes: ``python -m benchmarks.profile bert-base-train --backend gems``.

Prints the slowest kernels of one steady step and, for gems, the seconds of each compile stage.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks import timing
from benchmarks.cases import CASES
from benchmarks.worker import compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", help="comma list of cases")
    parser.add_argument("--backend", default="gems")
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    for name in args.models.split(","):
        profile(name, args)


def profile(name: str, args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    torch._dynamo.reset()
    torch.manual_seed(0)
    case = CASES[name].build(torch.bfloat16, device, args.small, True)
    run = compiled(case.model, args.backend)
    start = time.perf_counter()
    case.step(run)
    timing.synchronize(device)
    first = time.perf_counter() - start
    for _ in range(3):
        case.step(run)
    step = timing.median_ms(lambda: case.step(run), device, min_seconds=0.3)
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] if device.type == "cpu" else [activity.CUDA]
    with torch.profiler.profile(activities=kinds) as result:
        case.step(run)
        timing.synchronize(device)
    rows = [
        (e.self_device_time_total or e.self_cpu_time_total, e.count, e.key)
        for e in result.key_averages()
    ]
    total = sum(r[0] for r in rows)
    print(
        f"== {name} {args.backend}: {step:.3f} ms a step, {total / 1e3:.3f} ms on the device, "
        f"first call {first:.1f} s"
    )
    for us, count, key in sorted(rows, reverse=True)[: args.top]:
        print(f"   {us / 1e3:8.3f} ms {count:5d}x  {key[:110]}")
    if args.backend == "gems":
        _print_reports()


def _print_reports() -> None:
    import gems_compile

    for report in gems_compile.reports():
        spent = {k: round(v, 2) for k, v in report.seconds.items() if v >= 0.01}
        print(
            f"   {report.label}: {report.nodes} nodes, {report.fused} fused, {report.kernels} "
            f"kernels, {report.launches} launches, {report.aten_calls} ATen calls, {spent}"
        )
        for key, count in sorted(report.aten.items(), key=lambda t: -t[1])[:8]:
            print(f"        {count:4d}x {key[:120]}")
        for failure in report.failures:
            print(f"        FAILED {failure[:200]}")


if __name__ == "__main__":
    main()
