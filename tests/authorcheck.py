"""What tests of users' pointwise functions share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from helpers import assert_same_metadata, assert_same_values

from gems_compile.backend import Gems


def assert_like(got: Any, want: Any) -> None:
    """Equal dtype, shape, strides and near values."""
    assert_same_metadata(got, want)
    assert_same_values(got, want)


def launched(backend: Gems) -> tuple[int, int]:
    """(kernels, ATen calls) of all graphs."""
    return sum(r.launches for r in backend.reports), sum(r.aten_calls for r in backend.reports)


def module(folder: Path, text: str) -> ModuleType:
    """A module of this text."""
    head = "import torch, triton, triton.language as tl, gems_compile\n\n"
    file = folder / f"module_{len(list(folder.iterdir()))}.py"
    file.write_text(head + text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
