"""The groups of a composite are made again only where the fuser would find the same.

That they are made as they were found is checked in every test of the suite: see conftest.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, check, gems_only, rand
from torch import Tensor, nn

from gems_compile.backend import Gems
from gems_compile.lowering.replay import Groups, Stretch

pytestmark = gems_only


class Norms(nn.Module):
    """Equal batch norms of convolutions; ``between`` says what is done with their results."""

    def __init__(self, between: Callable[[Tensor, Tensor], Any], many: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(many))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(many))
        self.between = between

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        more = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, *rest = self.between(norm(conv(x)), x)
            more += rest
        return x, more


def every_second(change: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    count = [0]

    def between(y: Tensor, x: Tensor) -> Any:
        count[0] += 1
        return change(y, x) if count[0] % 2 else (y.relu(),)

    return between


BETWEEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "relu": lambda y, x: (y.relu(),),
    "residual": lambda y, x: ((y + x).relu(),),
    "returned": every_second(lambda y, x: (y.relu(), y)),
    "reduced": every_second(lambda y, x: (y.relu(), y.sum((0, 2, 3)))),
    "read by rows": every_second(lambda y, x: (y.relu(), y.sum(-1))),
    "copied": every_second(lambda y, x: (y.relu(), y.transpose(2, 3).contiguous())),
    "unread": lambda y, x: ((x * 2).relu(),),
    "statistics": every_second(lambda y, x: (F.gelu(y), (x * x).mean((0, 2, 3)))),
}


def norms(name: str) -> nn.Module:
    return Norms(BETWEEN[name]).to(DEVICE)


def linear() -> nn.Module:
    layers = (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()) for _ in range(4))
    return nn.Sequential(*layers).to(DEVICE)


def told(groups: Groups) -> dict[str, Any]:
    return {**vars(groups), "groups": [vars(group) for group in groups.groups]}


def lowered(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """The reports of a function and its backward."""
    backend = Gems()
    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return list(backend.reports)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", BETWEEN)
def test_equal_keys_come_to_equal_groups(
    monkeypatch: pytest.MonkeyPatch, name: str, channels_last: bool
) -> None:
    keep, seen = Stretch.keep, Counter[bool]()

    def find(stretch: Stretch) -> bool:
        fuser = stretch.replays.fuser
        stretch.start = len(fuser.groups), len(fuser.unfused)
        stretch.key = None if stretch.recipe is None else stretch.replays.key_of(stretch)
        return False

    def compare(stretch: Stretch) -> None:
        known = stretch.replays.known.get(stretch.key) if stretch.key is not None else None
        if known is None:
            keep(stretch)
        else:
            seen[told(known) == told(Groups(stretch))] += 1

    monkeypatch.setattr(Stretch, "follow", find)
    monkeypatch.setattr(Stretch, "keep", compare)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = rand(4, 8, 6, 6).to(memory_format=layout).requires_grad_()
    lowered(norms(name).to(memory_format=layout), x)
    assert seen[True]
    assert not seen[False]


@pytest.mark.parametrize("name", BETWEEN)
def test_nothing_changes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = count_made(monkeypatch)
    model, x = norms(name), rand(4, 8, 6, 6, grad=True)
    with_replay = lowered(model, x)
    assert made
    monkeypatch.setattr(Stretch, "follow", lambda stretch: False)
    monkeypatch.setattr(Stretch, "keep", lambda stretch: None)
    without = lowered(model, x)
    for one, two in zip(with_replay, without, strict=True):
        assert [s.text for s in one.sources] == [s.text for s in two.sources]
        assert (one.launches, one.aten, one.peak_bytes) == (two.launches, two.aten, two.peak_bytes)


def count_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many Values each stretch had whose groups were made again."""
    made, make = [], Groups.make

    def counted(groups: Groups, stretch: Stretch) -> None:
        made.append(len(stretch.values))
        make(groups, stretch)

    monkeypatch.setattr(Groups, "make", counted)
    return made


@pytest.mark.parametrize("name", BETWEEN)
def test_numbers_of_norms(name: str) -> None:
    x = rand(4, 8, 6, 6, grad=True)
    check(norms(name), x, rtol=1e-3, atol=1e-4)


def test_layer_norms_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_made(monkeypatch)
    model, x = linear(), rand(6, 8)
    check(model, x, rtol=1e-4, atol=1e-5)
    assert len(made) >= 3


def test_what_a_kernel_knows_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_made(monkeypatch)

    def fn(x: Tensor, w: Tensor) -> list[Tensor]:
        out = []
        for _ in range(3):
            x = F.layer_norm(x * 2, (8,), w)  # the product is in the kernel of the norm
            out.append(x)
        return out

    check(fn, rand(6, 8), rand(8))
    assert not made
