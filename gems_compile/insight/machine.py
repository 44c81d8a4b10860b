"""What this process runs on: versions, device, driver and target, for ``doctor`` and dumps."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def facts() -> dict[str, Any]:
    """Versions and device, as JSON takes them."""
    from ..config import vendor
    from ..kernels.target import current_target

    target = current_target(vendor())
    return {
        "versions": versions(),
        "device": device(),
        "driver": driver(),
        "target": "none" if target is None else target.label,
    }


@functools.cache
def versions() -> dict[str, str]:
    import torch

    toolkits = (("cuda", torch.version.cuda), ("hip", torch.version.hip))
    return {
        "gems-compile": installed("gems-compile"),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: number for name, number in toolkits if number is not None},
    }


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def driver() -> str:
    """The GPU driver's version, and the CUDA that it speaks: ``570.86.15 (CUDA 12.8)``."""
    from ..lowering.private import driver_version

    speaks = driver_version()
    cuda = f"CUDA {speaks // 1000}.{speaks % 1000 // 10}" if speaks else ""
    for file in DRIVERS:
        with contextlib.suppress(OSError):
            with open(file, encoding="utf-8", errors="replace") as f:
                number = re.search(r"\d+(?:\.\d+)+", f.read())
            if number is not None:
                return f"{number[0]} ({cuda})" if cuda else number[0]
    return cuda or "none"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"
