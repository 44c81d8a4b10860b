"""What tests of whole graphs from the cache share."""

from __future__ import annotations

import glob
from collections.abc import Callable
from typing import Any

import torch

from gems_compile.backend import Gems


def entries(folder: Any) -> list[str]:
    return glob.glob(f"{folder}/aotautograd/*/*")


def said(reports: list[Any]) -> set[str]:
    return {report.cache for report in reports}


def results(step: Callable[[Any], Any], make: Callable[[], Any], **compile: Any) -> Any:
    """What ``step`` of the compiled thing returns, and the reports."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    backend = Gems()
    found = step(torch.compile(make(), backend=backend, **compile))
    return found, list(backend.reports)  # the backend forgets them when torch is reset
