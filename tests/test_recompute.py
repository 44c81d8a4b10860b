"""Values that a kernel computes anew rather than load what another kernel stored."""

from __future__ import annotations

import math

import torch
from helpers import compile_, gems_only, rand

from gems_compile.backend import Gems


def written(fn, *args) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of all that the kernels of fn's graph store."""
    backend = Gems()
    results = torch.compile(fn, backend=backend)(*args)
    for got, wanted in zip(results, fn(*args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    return [
        (what.dtype, tuple(what.shape))
        for source in backend.reports[-1].source_of.values()
        for _, role, what in source.params
        if role == "out"
    ]


def sums_both_ways(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two kernels, for no program has whole rows and whole columns, that want one float32 value."""
    wide = x.float() * 2 + 1
    return wide.sum(0), (wide * wide).sum(1)


@gems_only
def test_wide_values_are_computed_from_narrow_ones():
    x = rand(150, 17000, dtype=torch.bfloat16)
    assert ("float32", (150, 17000)) not in written(sums_both_ways, x)


@gems_only
def test_log_probabilities_of_the_labels_alone():
    """A language model's loss: cast, then rows counted as one axis, then one number of each row."""
    logits = rand(4, 20, 3000, dtype=torch.bfloat16)
    labels = torch.randint(0, 3000, (80,), device=logits.device)
    labels[3] = -100

    def loss(logits, labels):
        flat = logits.float().view(-1, logits.shape[-1])
        return (torch.nn.functional.cross_entropy(flat, labels),)

    assert all(math.prod(shape) < logits.numel() for _, shape in written(loss, logits, labels))


@gems_only
def test_what_is_returned_is_stored():
    x = rand(150, 17000, dtype=torch.bfloat16)

    def fn(x):
        wide = x.float() * 2 + 1
        return wide, (wide * wide).sum(1)

    assert written(fn, x).count(("float32", (150, 17000))) == 1


@gems_only
def test_memory_that_is_written_meanwhile_is_not_read_again():
    """The old values are wanted by a kernel that may run after they are overwritten."""
    x = rand(64, 600, dtype=torch.bfloat16)

    def fn(x):
        wide = x.float() * 2 + 1
        columns = wide.sum(0)
        x.copy_(columns.to(x.dtype).expand(64, 600))
        return columns, (wide * wide).sum(1)

    eager, ours = x.clone(), x.clone()
    wanted, got = fn(eager), compile_(fn)(ours)
    torch.testing.assert_close(ours, eager)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-2)


@gems_only
def test_transposed_copies_stay_copies():
    """A kernel that wants rows reads the copy whose rows are contiguous."""
    x = rand(40, 700, dtype=torch.bfloat16)

    def fn(x):
        turned = (x.t() + 1).contiguous()
        return turned.sum(1), torch.softmax(turned, 1)

    for got, wanted in zip(compile_(fn)(x), fn(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
