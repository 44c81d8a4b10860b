"""Norms whose rows or channels are too long for one program."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, compile_, gems_only
from torch import nn

from gems_compile.backend import Gems


def channels(offset: float, first: float) -> torch.Tensor:
    """[8, 6, 16, 16] with four kinds of channels; ``first`` stands where each part begins."""
    torch.manual_seed(5)
    x = torch.randn(8, 6, 16, 16)
    scale = torch.tensor([1.0, 1e-3, 1e3, 1.0, 0.1, 10.0])[:, None, None]
    x = x * scale + offset * scale
    x[:, :, 0, 0] += first * scale[:, 0, 0]
    return x.to(DEVICE)


@gems_only
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("offset", "first", "rtol"),
    # the first element of a part may be far out; then the variance keeps fewer digits
    [(0.0, 0.0, 1e-5), (100.0, 0.0, 1e-4), (0.0, 30.0, 1e-4), (-1000.0, 30.0, 1e-3)],
)
def test_batch_norm_moments(layout, offset, first, rtol):
    x = channels(offset, first).contiguous(memory_format=layout)
    norm = nn.BatchNorm2d(6, momentum=1.0).to(DEVICE)
    y = compile_(norm)(x)
    exact = x.double()
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=rtol, atol=0)
    wanted = nn.functional.batch_norm(exact, None, None, training=True)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3 if offset else 1e-4)


@gems_only
def test_batch_norm_reads_a_long_channel_twice():
    """Once for the moments, once to normalise: no kernel loops over it two times."""
    x = channels(0.0, 0.0).contiguous(memory_format=torch.channels_last)
    backend = Gems()
    torch.compile(nn.BatchNorm2d(6).to(DEVICE), backend=backend)(x)
    (report,) = [r for r in backend.reports if r.kind != "backward"]
    readers = [
        source.text
        for source in report.source_of.values()
        if any(role == "in" and what.shape == x.shape for _, role, what in source.params)
    ]
    assert len(readers) == 2
    assert all(text.count("for start in") <= 1 for text in readers)
