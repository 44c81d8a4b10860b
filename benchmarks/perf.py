"""The benchmark of a family as a pytest test: a case each, whose numbers must be right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.op_cases import cases
from benchmarks.op_timing import Copies, Setting, measure
from benchmarks.table import Row, number


@functools.cache
def copies(dtype: str) -> Copies:
    return Copies(Setting(dtype=dtype))


def line(row: Row) -> str:
    """One row: microseconds of ATen and of ours, their ratio, share of a copy's speed."""
    if row["status"] != "ok":
        return f"{row['case']}: {row['status']}"
    share = number(row.get("of_copy"), ".2f")
    return (
        f"{row['case']}, {row['mode']}: {row['eager_us']:.2f} / {row['gems_us']:.2f} us = "
        f"{row['ratio']:.2f}, {share} of a copy"
    )


def performance_test(family: str) -> Callable[..., None]:
    """A test of each case of a family: times are printed (``-s``), wrong numbers fail."""

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are timed on a GPU")
    @pytest.mark.parametrize("name", [c.name for c in cases().values() if c.family == family])
    def test(name: str, mode: str) -> None:
        setting = Setting(mode=mode)
        row: dict[str, Any] = measure(cases()[name], setting, copies(setting.dtype))
        print(f"\n{line(row)}")
        assert not row["status"].startswith(("wrong", "failed")), row["status"]

    return test
