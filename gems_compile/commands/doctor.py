"""``python -m gems_compile doctor``: what this machine has, and whether a compile works."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from typing import Any

from ..insight.machine import device, driver, versions
from ..insight.plan import in_bytes
from ..tables import Table, show


def main(as_json: bool, found: dict[str, Any] | None = None) -> int:
    """Print the findings of ``examine``; the exit code is 0 if the self-test passed."""
    found = examine() if found is None else found
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        rows = [(name, "" if value is None else str(value)) for name, value in found.items()]
        show([Table("", ("", ""), [r for r in rows if "\n" not in r[1]])])
        if "trouble" in found:
            print(f"\n{found['trouble']}")
    return 0 if found["self-test"].startswith("passed") else 1


def examine() -> dict[str, Any]:
    import torch

    from ..config import cache_dir, vendor
    from ..kernels.target import current_target
    from ..lowering import native

    target = current_target(vendor())
    found: dict[str, Any] = {
        **versions(),
        "device": device(),
        "driver": driver(),
        "target": "none: graphs run as ATen" if target is None else target.label,
        "cache": cache_dir() or "none that is safe to use: kernels are compiled afresh",
        "cached": _cached(),
        "whole graphs": _whole_graphs(),
        "launcher": native.in_use(target, cache_dir()),
    }
    start = time.perf_counter()
    try:
        verdict = _self_test(torch, target)
    except Exception as error:
        verdict = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
        found["trouble"] = traceback.format_exc()
    found["self-test"] = f"{verdict} ({time.perf_counter() - start:.1f} s)"
    return found


def _self_test(torch: Any, target: Any) -> str:
    """A small function, forward and backward, against eager."""
    from ..backend import Gems

    device = "cpu" if target is None else target.device
    x = torch.linspace(-3, 3, 4 * 33, device=device).view(4, 33).requires_grad_()

    def fn(x: Any) -> Any:
        return torch.softmax(torch.nn.functional.gelu(x) * 2 + x, -1)

    backend, results = Gems(fresh=True), []
    for run in (fn, torch.compile(fn, backend=backend)):
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    error = max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True))
    launches = sum(report.launches for report in backend.reports)
    failures = [text for report in backend.reports for text in report.failures]
    if failures:
        return f"FAILED: {failures[0]}"
    if not error < 1e-5:
        return f"FAILED: differs from eager by {error:.1e}"
    if not launches:
        return "passed, as ATen: no kernel ran"
    return f"passed: {launches} kernels ran, largest difference from eager {error:.0e}"


def _cached() -> str:
    """``212 kernels (12.1 MB), 3 whole graphs (0.5 MB)``"""
    from ..cache import held

    count, size = Counter[str](), Counter[str]()
    for found in held():
        kind = found["what"].split(",")[0]  # of any target
        count[kind] += found["count"]
        size[kind] += found["bytes"]
    return ", ".join(f"{count[k]} {k} ({in_bytes(size[k])})" for k in count) or "nothing"


def _whole_graphs() -> str:
    """Where torch keeps them, or why it does not."""
    from ..config import Config
    from ..lowering.whole_graphs import folder
    from ..warm import why_off

    off = why_off(Config.from_call())
    return f"off: {off}" if off is not None else folder() or "torch tells no folder"
