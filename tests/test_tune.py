"""``mode="max-autotune"``: other tiles are right, the fastest is taken, remembered, and told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import check, gems_only, ints, rand
from torch import Tensor
from torch.nn import functional as F

from gems_compile.backend import Gems
from gems_compile.lowering import choices, tune
from gems_compile.lowering.schedule import Tile
from gems_compile.lowering.tiling import kind_of

pytestmark = gems_only


class Fake:
    """Times kernels without running them: the one at ``place`` among a kernel's is the fastest."""

    def __init__(self, place: int) -> None:
        self.place, self.asked = place, list[list[Tile]]()

    def __call__(self, kernels: Sequence[tuple[Any, Any]]) -> list[float]:
        self.asked.append([s.body and s.tiling.tile for s, _ in kernels])
        best = self.place % len(kernels)
        return [10.0 if k == best else 20.0 + k for k in range(len(kernels))]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Callable[[int], Fake]:
    """Sets what times kernels; every kernel is worth it, and nothing is known yet."""
    monkeypatch.setattr(tune, "LEAST_US", 0.0)
    monkeypatch.setattr(tune, "LEAST_SHARE", 0.0)
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path))

    def use(place: int) -> Fake:
        times = Fake(place)
        monkeypatch.setattr(choices, "_known", {})
        monkeypatch.setattr(tune, "timer", lambda device, number: times)
        return times

    return use


def compiled(fn: Callable[..., Any], *inputs: Any, **kwargs: Any) -> list[Any]:
    """The reports of a compile that measures."""
    backend = Gems()
    torch._dynamo.reset()
    run = torch.compile(fn, backend=backend, options={"tune": True}, **kwargs)
    outputs = run(*inputs)
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if leaves:
        torch.autograd.grad(outputs, leaves, torch.ones_like(outputs))
    return list(backend.reports)


def gelu(x: Tensor, y: Tensor) -> Tensor:
    return F.gelu(x) * y


def rows_of_numbers(x: Tensor, s: Tensor) -> Tensor:
    return (x - s[:, None]).exp()


def transposed(x: Tensor, y: Tensor) -> Tensor:
    return (x.t() * 2 + y).contiguous()


def softmax(x: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(x * y, -1)


def long_norm(x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(x + y, x.shape[-1:])


def columns(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x * y
    return z.sum(0), z.amax(0)


def padded(x: Tensor) -> Tensor:
    return F.pad(torch.relu(x), (1, 1, 1, 1))


def gated(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([F.silu(x), y * 2], -1).exp()


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x + 1).max(-1)


def scanned(x: Tensor) -> Tensor:
    return (x + 1).cumsum(-1) * 2


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    return F.layer_norm(table[index] + 1, table.shape[-1:])


def norm_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "flat": (gelu, lambda: (rand(130, 257), rand(130, 257))),
    "flat by rows": (rows_of_numbers, lambda: (rand(24, 1030), rand(24))),
    "flat carried": (padded, lambda: (rand(4, 9, 31, 31),)),
    "flat in pieces": (gated, lambda: (rand(64, 1024), rand(64, 2048))),
    "square": (transposed, lambda: (rand(200, 96), rand(96, 200))),
    "row": (softmax, lambda: (rand(37, 300), rand(37, 300))),
    "row argmax": (largest, lambda: (rand(37, 300),)),
    "row scan": (scanned, lambda: (rand(9, 700),)),
    "row gather": (looked_up, lambda: (rand(50, 96), ints(70, high=50))),
    "loop online": (softmax, lambda: (rand(3, 17001), rand(3, 17001))),
    "loop": (long_norm, lambda: (rand(3, 17000), rand(3, 17000))),
    "column": (columns, lambda: (rand(60, 100), rand(60, 100))),
    "column loop": (columns, lambda: (rand(1100, 600), rand(1100, 600))),
    "sweep": (
        norm_gradient,
        lambda: (rand(700, 96, grad=True), rand(96, grad=True), rand(96, grad=True)),
    ),
}


@pytest.mark.parametrize("place", range(1, 8))
@pytest.mark.parametrize("name", CASES)
def test_every_tile_is_right(name: str, place: int, fake: Any) -> None:
    fn, make = CASES[name]
    times = fake(place)
    check(fn, *make(), options={"tune": True}, rtol=1e-4, atol=1e-4)
    assert times.asked


@pytest.mark.parametrize("name", CASES)
def test_each_kind_has_tiles_to_try(name: str, fake: Any) -> None:
    fn, make = CASES[name]
    fake(0)
    reports = compiled(fn, *make())
    kinds = {kind_of(s.tiling.whole) for r in reports for s in r.sources if s.tiling}
    kind = next(k for k in ("column loop", *name.split(" ")) if name.startswith(k))
    assert kind in kinds
    assert any(3 <= len(t.times) <= 8 for r in reports for t in r.tuned)
