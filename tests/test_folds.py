"""Few long rows: reduced in parts by one launch, and combined by whichever kernel needs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_same_values, check, gems_only, ints, rand
from opcheck import lower, options, trace
from torch import Tensor

import gems_compile
from gems_compile.kernels.target import INTERPRETER
from gems_compile.lowering import folds
from gems_compile.lowering.parts import pays
from gems_compile.lowering.pipeline import compile_graph

pytestmark = gems_only

LENGTH = 1 << 15
aten = torch.ops.aten


def _odd_rows(rows: int = 6, length: int = LENGTH) -> Tensor:
    """Infinities and a NaN, also in all of a part or of a row."""
    x = rand(rows, length)
    x[1] = float("-inf")
    x[2, 7] = float("inf")
    x[3, -1] = float("nan")
    x[4, : length // 2] = float("-inf")
    x[5, 1:] = float("-inf")
    return x


def _check(
    fn: Callable[..., Any],
    *inputs: Tensor,
    launches: int,
    multiprocessors: int = 132,
    **near: float,
) -> str:
    """As many launches, float64's numbers; the last kernel's text."""
    got, report = lower(fn, *inputs, alone=True, multiprocessors=multiprocessors)
    assert (report.launches, report.aten_calls) == (launches, 0), report.wrapper
    wanted = fn(*(x.double() if x.is_floating_point() else x for x in inputs))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for a, b in zip(got, wanted, strict=True):
        assert_same_values(a, b.to(a.dtype), **{"rtol": 2e-5, "atol": 1e-5, **near})
    return report.sources[-1].text


SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
}


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax(name: str) -> None:
    _check(SOFTMAX[name], _odd_rows(), launches=2, atol=1e-9)


def test_softmax_of_one_row() -> None:
    """Then every program is of that row, wherever it lies."""
    text = _check(lambda x: torch.softmax(x.flatten(), 0), rand(1, 3 * 16411), launches=2)
    assert "reductions.only" in text


def test_softmax_by_hand() -> None:
    """The maximum is combined by the kernel that sums, and by the one that divides."""

    def by_hand(x: Tensor) -> Tensor:
        e = (x - x.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)

    _check(by_hand, rand(3, LENGTH), launches=3, atol=1e-9)


@pytest.mark.parametrize("length", [LENGTH, 3 * 16411])
def test_norms(length: int) -> None:
    x, w, b = rand(5, length) * 2 + 5, rand(length), rand(length)

    def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return aten.native_layer_norm(x, [length], w, b, 1e-5)  # statistics are stored, too

    def rms_norm(x: Tensor, w: Tensor) -> Tensor:
        return w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())

    _check(layer_norm, x, w, b, launches=2, rtol=1e-4)
    _check(rms_norm, x, w, launches=2)


def test_variance() -> None:
    _check(lambda x: torch.var_mean(x, -1), rand(3, LENGTH) + 100, launches=2, rtol=1e-4)
    _check(lambda x: x / x.std(correction=3), rand(3, LENGTH), launches=2)


def test_group_norm() -> None:
    """Groups of channels; the rows' programs find them by more than one loop variable."""
    x, w, b = rand(2, 8, 128, 128) + 1, rand(8), rand(8)

    def fn(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return aten.native_group_norm(x, w, b, 2, 8, 128 * 128, 4, 1e-5)

    _check(fn, x, w, b, launches=2, rtol=1e-4)


def test_cross_entropy() -> None:
    """One program, whose lanes are rows, combines their parts one by one."""
    logits, labels = rand(40, 20000), ints(40, high=20000)
    labels[3] = -100
    _check(F.cross_entropy, logits, labels, launches=2, multiprocessors=132 * 4)


def test_gradient_of_softmax() -> None:
    y, dy = torch.softmax(rand(3, LENGTH), -1), rand(3, LENGTH)

    def backward(dy: Tensor, y: Tensor) -> Tensor:
        return y * dy - y * (y * dy).sum(-1, keepdim=True)

    _check(backward, dy, y, launches=2)


def test_what_others_read_too() -> None:
    """A statistic that is returned, read by ATen, or waited for."""

    def returned(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = x.sum(-1, keepdim=True)
        return x / total.exp().log1p(), total * 2, total

    def waited_for(x: Tensor) -> Tensor:
        total = x.mean(-1, keepdim=True)
        return x + total + torch.sort(total, 0)[0]

    x = rand(3, LENGTH) / LENGTH
    _check(returned, x, launches=2)
    got, report = lower(waited_for, x, multiprocessors=132)
    assert report.aten_calls == 1 and report.launches == 3
    assert_same_values(got[0], waited_for(x.double()).float(), rtol=1e-5, atol=1e-5)


def test_rows_that_no_program_has_to_itself() -> None:
    """The results' neighbours lie in different rows: a kernel combines the parts before."""

    def fn(x: Tensor) -> Tensor:
        return (x / x.exp().sum(-1, keepdim=True)).T.contiguous()

    _check(fn, rand(3, LENGTH), launches=3)


@pytest.mark.parametrize("rows, length, launches", [(64, 20000, 1), (64, 200000, 2), (1, 16384, 1)])
def test_little_data_is_one_launch(rows: int, length: int, launches: int) -> None:
    """Splitting 5 MB would take longer than it saves."""
    if DEVICE == "cpu" and rows * length > 2**21:
        rows, length, launches = 3, 40000, 2
    _, report = lower(SOFTMAX["softmax"], rand(rows, length), alone=True, multiprocessors=132)
    assert report.launches == launches


@pytest.mark.parametrize(
    ("rows", "kilobytes", "passes", "expected"),
    [
        (256, 803, 1, True),  # batch norm's gradients of 64 x 256 x 56 x 56: 127 us, not 142
        (128, 803, 1, True),  # 68, not 105
        (256, 100, 1, False),  # 32 x 256 x 28 x 28: 16, not 21
        (
            256,
            262,
            3,
            False,
        ),  # softmax, whose rows are in cache when they are read again: 47, not 60
        (256, 524, 3, True),  # of rows that are not: 111, not 145
        (128, 262, 3, False),  # 28, not 34
        (8, 262, 3, True),  # 7.7, not 15.0
    ],
)
def test_what_two_launches_are_worth(
    rows: int, kilobytes: int, passes: int, expected: bool
) -> None:
    """What was faster on an H200, bfloat16."""
    assert pays(rows, kilobytes * 1000, passes, 132) is expected


def test_images_whose_channels_are_last_need_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial would say what is told without one: no program has a row of its own."""
    trials = []
    plain = folds._can_be_written

    def noted(*about: Any) -> bool:
        trials.append(plain(*about))
        return trials[-1]

    def texts() -> list[str]:
        x = torch.empty(64, 512, 7, 7).to(memory_format=torch.channels_last)
        args = x, *(torch.ones(512) for _ in range(4))
        norm = aten._native_batch_norm_legit_functional
        graph = trace(lambda *args: norm(*args, True, 0.1, 1e-5)[0].relu(), *args)
        target = dataclasses.replace(INTERPRETER, multiprocessors=132)
        return [s.text for s in compile_graph(graph, [], options(target=target))[1].sources]

    monkeypatch.setattr(folds, "_can_be_written", noted)
    told = texts()
    assert not trials
    monkeypatch.setattr(folds, "_runs_across_rows", lambda *_: False)
    assert texts() == told
    assert trials and not any(trials)


@pytest.mark.parametrize("length", [2, 3, 16])
def test_parts_that_are_one_number_count_each(length: int) -> None:
    """The gradient of a mean is one number for all of a row."""

    def fn(x: Tensor) -> Tensor:
        spread = x.log_softmax(0).mean([0], keepdim=True).var([0], correction=0)
        return torch.sin(spread + x.softmax(0))

    check(fn, rand(length, grad=True))
    assert "reductions.only(" in gems_compile.reports()[-1].sources[-1].text
