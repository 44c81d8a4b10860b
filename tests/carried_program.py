"""A program that compiles a training step and prints, as JSON, which kernels were compiled for it;
see ``test_binaries.py``. Arguments: artifacts to load, to save.

Without a GPU it pretends to have one: the graphs are for the CPU and the kernels for sm_90, and
launching one does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import nn

import gems_compile
from gems_compile import backend, warm
from gems_compile.kernels.target import compile_target
from gems_compile.lowering import load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pretend(arch: int) -> None:
    target = replace(compile_target("nvidia", arch), device="cpu")
    for module in (backend, warm):
        module.current_target = lambda vendor=None: target  # type: ignore[attr-defined]

    def launcher(source: Any, record: dict[str, Any], path: str, device: int | None) -> Any:
        assert Path(record["path"]).stat().st_size and Path(path).read_text() == source.text
        return lambda *args: None

    load.static_launcher = launcher  # type: ignore[attr-defined]


def compiled_kernels() -> list[str]:
    """The kernels that are compiled from now on, here or by the workers."""
    found: list[str] = []

    def noting(do: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            if "label" not in args[-1]:  # else it is a wrapper's text
                found.append(Path(args[-1]["path"]).stem)
            return do(*args)

        return noted

    load.do = noting(load.do)  # type: ignore[attr-defined]
    load.Pool.submit = noting(load.Pool.submit)  # type: ignore[method-assign]
    return found


def build() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64), nn.Softmax(-1)
    return nn.Sequential(*parts).to(DEVICE)


def main(load: str = "", save: str = "") -> None:
    if DEVICE == "cpu":
        pretend(int(os.environ.get("PRETENDED_ARCH", "90")))
    found = compiled_kernels()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if load:
        torch.compiler.load_cache_artifacts(Path(load).read_bytes())
    module = build()
    y = torch.compile(module, backend=backend.gems)(torch.ones(256, 64, device=DEVICE))
    if save:  # before the backward's kernels were waited for
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        Path(save).write_bytes(artifacts[0])
    y.square().sum().backward()
    results = b"".join(p.grad.cpu().numpy().tobytes() for p in module.parameters())
    reports = gems_compile.reports()
    told = {
        "compiled": sorted(found),
        "kernels": sorted(source.key for report in reports for source in report.sources),
        "cache": sorted({report.cache for report in reports}),
        "digest": hashlib.sha256(results).hexdigest(),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
