"""Who draws dropout's seed: the host, where it can; the same seed either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, compile_, gems_only, rand
from torch import Tensor

from gems_compile import explain
from gems_compile.backend import Gems
from gems_compile.kernels.dropout import DRAWN_AT_ONCE, IN_MEMORY, draw_seed, number_drawn
from gems_compile.lowering import binding

pytestmark = gems_only
BY_HOST = " = seed()"


def reports_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    backend = Gems()
    torch.compile(fn, backend=backend, fullgraph=True, **kwargs)(*args)
    return backend.reports


def mask_of(shape: tuple[int, ...], p: float, salt: int = 1) -> Tensor:
    """By ATen, from the generator as it is."""
    drawn = torch.ops.gems.seed(torch.device(DEVICE))
    return torch.ops.gems.dropout_mask(drawn, shape, p, salt)


def state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


def two_layers(x: Tensor, w: Tensor) -> Tensor:
    """Two kernels in forward and two in backward that read the seed."""
    return F.dropout(F.dropout(x.relu(), 0.5) @ w, 0.25).sum()


def test_a_draw_is_no_call() -> None:
    x, w = rand(16, 16, grad=True), rand(16, 16, grad=True)
    forward, backward = reports_of(two_layers, x, w)
    assert forward.wrapper.count(BY_HOST) == 1 and BY_HOST not in backward.wrapper
    assert forward.aten_calls == 1  # the product
    assert forward.wrapper.index(BY_HOST) < forward.wrapper.index("r0(")


def test_explain_counts_no_call() -> None:
    (graph,) = explain(lambda x: F.dropout(x * 2, 0.5), rand(8, 8)).graphs
    (seed,) = (node for node in graph.nodes if "seed" in node.op)
    assert seed.fate == "free" and "drawn by the CPU" in seed.detail
    assert graph.aten_calls == 0


@pytest.fixture(params=["by the host", "in memory"])
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take the seed itself, or find it in memory, as in a CUDA graph."""
    if request.param == "in memory":
        device = torch.device(DEVICE)
        monkeypatch.setattr(binding, "drawer", lambda _: lambda: (draw_seed(device), IN_MEMORY))


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_are_those_of_the_seed_that_aten_would_draw(dynamic: bool) -> None:
    x, w = rand(16, 16).requires_grad_(), torch.eye(16, device=DEVICE)
    run = compile_(lambda x: F.dropout(F.dropout(x * 1.0, 0.5) @ w, 0.25), dynamic=dynamic)
    for _ in range(2):
        torch.manual_seed(7)
        out = run(x)
        after = state()
        torch.manual_seed(7)
        kept = mask_of((16, 16), 0.5, 1)
        assert torch.equal(after, state())
        torch.manual_seed(7)
        kept &= mask_of((16, 16), 0.25, 2)
        want = x * kept / 0.375
        torch.testing.assert_close(out, want)
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, kept / 0.375)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, s: (torch.ops.gems.dropout_mask(s, x.shape, 0.5, 3), s),
        lambda x, s: (torch.ops.gems.dropout_mask(s, x.shape, 0.5, 3), s.view(1)),
        lambda x, s: (torch.ops.gems.dropout_mask(s, x.shape, 0.5, 3), s + 1),
        lambda x, s: (torch.ops.gems.dropout_mask(s, x.shape, 0.5, 3), torch.sort(s.view(1))[0]),
        lambda x, s: (x + 1, s),
        lambda x, s: (torch.ops.gems.dropout_mask(s, x[:0].shape, 0.5, 3), s),
    ],
    ids=["returned", "viewed", "computed with", "read by ATen", "alone", "of nothing"],
)
def test_the_seed_is_in_memory_for_others(fn: Callable[..., Any]) -> None:
    def whole(x: Tensor) -> Any:
        return fn(x, torch.ops.gems.seed(x.device))

    x = rand(6, 8)
    run = compile_(whole)
    torch.manual_seed(3)
    want = whole(x)
    torch.manual_seed(3)
    for a, b in zip(run(x), want, strict=True):
        assert torch.equal(a, b)


def test_who_draws() -> None:
    """ATen's draw where ATen reads the seed, or where no kernel surely stores it."""

    def mask_and(x: Tensor, s: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return torch.ops.gems.dropout_mask(s, x.shape, 0.5, 3), of(s)

    def drawn(of: Callable[[Tensor], Tensor]) -> bool:
        torch._dynamo.reset()
        (report,) = reports_of(lambda x: mask_and(x, torch.ops.gems.seed(x.device), of), rand(6, 8))
        return BY_HOST in report.wrapper

    assert drawn(lambda s: s)
    assert not drawn(lambda s: torch.sort(s.view(1))[0])
    (report,) = reports_of(lambda x: (x + 1, torch.ops.gems.seed(x.device)), rand(6, 8))
    assert BY_HOST not in report.wrapper


def test_sizes_that_are_not_zero_are_known() -> None:
    (report,) = reports_of(lambda x: F.dropout(x + 1, 0.5), rand(6, 8), dynamic=True)
    assert BY_HOST in report.wrapper and report.sources[0].bound is not None


def test_pieces_load_the_seed() -> None:
    """Of a kernel in pieces, the first program may belong to one that does not read the seed."""

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return F.dropout(torch.cat([a.relu(), b], -1), 0.5)

    a, b = rand(64, 1024), rand(64, 1024)
    report, *_ = reports_of(fn, a, b)
    assert "place = pid" in report.sources[0].text and BY_HOST not in report.wrapper
    torch.manual_seed(5)
    got = compile_(fn)(a, b)
    torch.manual_seed(5)
    assert torch.equal(got, torch.cat([a.relu(), b], -1) * mask_of((64, 2048), 0.5) * 2)


@pytest.mark.usefixtures("drawn")
def test_empty_tensors() -> None:
    x = rand(0, 8, grad=True)
    y, z = compile_(lambda x: (F.dropout(x, 0.5), F.dropout(x.sum(0) + 1, 0.5)))(x)
    assert y.shape == (0, 8)
    z.sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 8)


def test_the_number_is_philox() -> None:
    """The first vector of Random123's known answers."""
    assert number_drawn(0, 0) + 2**63 == 0x6627E8D5E169C58D
    assert number_drawn(2**64 - 1, 0) != number_drawn(0, 4) != number_drawn(0, 2**34)


# on a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 1, 1234, 2**31, 2**63 + 5, -1])
def test_the_number_is_what_aten_draws(seed: int) -> None:
    device = torch.device("cuda")
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    torch.manual_seed(seed)
    for offset in (0, 4, 400, 2**20, 2**34 + 8, 2**40):
        generator.set_offset(offset)
        assert int(draw_seed(device)) == number_drawn(generator.initial_seed(), offset)
        assert generator.get_offset() == offset + DRAWN_AT_ONCE


@pytest.mark.gpu
def test_replays_of_a_cuda_graph_draw_anew() -> None:
    """And what a replay draws from a seed is what a plain call draws."""
    x = torch.ones(64, 64, device="cuda", requires_grad=True)
    fn = compile_(lambda x: F.dropout(x * 1.0, 0.5))

    def step() -> tuple[Tensor, Tensor]:
        out = fn(x)
        return out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))

    torch.manual_seed(9)
    plain = [step() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    torch.manual_seed(9)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append([t.clone() for t in held])
    for mine, other in zip(plain, replayed, strict=True):
        assert all(map(torch.equal, mine, other))
        assert torch.equal(mine[0] != 0, mine[1] != 0)
    assert not torch.equal(plain[0][0], plain[1][0])
