"""CUDA graphs: what is captured, what is copied, and that nothing a caller holds is written over.

Without a GPU, ``fake_graphs`` stands for torch's CUDA graph trees.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from fake_graphs import (
    MLP,
    NEAR,
    ON_GPU,
    FakeTrees,
    compiled,
    cpu_only,
    gpu_only,
    told,
    train_like_default,
)
from helpers import DEVICE, gems_only, ints, rand
from torch import nn

import gems_compile
from gems_compile.config import Config
from gems_compile.lowering import captured, cuda_graphs

pytestmark = gems_only


# what callers get ---------------------------------------------------------------------------------


def test_results_stay_valid_while_they_are_held(trees):
    model = MLP().to(DEVICE).eval()
    run, backend = compiled(model)
    inputs = [rand(4, 16) for _ in range(6)]
    with torch.no_grad():
        found = [run(x) for x in inputs]
        for x, y in zip(inputs, found, strict=True):
            torch.testing.assert_close(y, model(x), **NEAR)
    assert trees.replays >= 3
    assert "captured as a CUDA graph: " in told(backend)
    assert "own(" in backend.reports[0].wrapper


def test_training_steps_are_those_of_default_mode(trees):
    train_like_default(trees)


def test_gradients_add_up_and_stay(trees):
    model = MLP().to(DEVICE)
    run, _ = compiled(model)
    inputs = [rand(4, 16) for _ in range(6)]
    for x in inputs:
        run(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for x in inputs:
        model(x).sum().backward()
    for a, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, **NEAR)


@pytest.mark.parametrize("lets_go", [True, False])
def test_gradients_are_lent_to_a_loop_that_lets_go_of_them(trees, lets_go):
    model = MLP().to(DEVICE)
    other = copy.deepcopy(model)
    run, _ = compiled(model)
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for _ in range(8):
        x = rand(8, 16)
        for fn, optimizer in zip((run, other), steps, strict=True):
            optimizer.zero_grad(set_to_none=lets_go)
            fn(x).square().mean().backward()
            optimizer.step()
    lent = [lender.lends for lender in cuda_graphs._turns[0].lenders]
    assert lent == ([True] if lets_go else [])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@gpu_only
def test_lent_gradients_that_are_kept_after_all(trees):
    model = MLP().to(DEVICE)
    run, _ = compiled(model)
    parameters, kept = list(model.parameters()), []
    for k in range(12):
        x = rand(8, 16)
        found = torch.autograd.grad(run(x).square().mean(), parameters)
        wanted = torch.autograd.grad(model(x).square().mean(), parameters)
        if k in (6, 7, 9):
            kept.append((found, wanted))
        del found, wanted
    for found, wanted in kept:
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **NEAR)


def test_a_graph_for_each_size_up_to_a_limit(trees, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_SIZES", 3)
    model = MLP().to(DEVICE).eval()
    run, backend = compiled(model, dynamic=True)
    with torch.no_grad():
        for _ in range(4):
            for n in (2, 3, 5, 7, 9):
                x = rand(n, 16)
                torch.testing.assert_close(run(x), model(x), **NEAR)
    assert "was captured for 3 sets of sizes; others run without" in told(backend)
    assert trees.replays >= 6


def test_training_with_sizes_that_change(trees):
    model = MLP().to(DEVICE)
    run, _ = compiled(model, dynamic=True)
    for _ in range(3):
        for n in (2, 3, 5):
            x = rand(n, 16)
            wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            found = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, **NEAR)


def test_dropout_draws_anew_and_repeats_itself_from_one_seed(trees):
    model = MLP(0.5).to(DEVICE)
    run, _ = compiled(model)
    x = rand(8, 16)
    with torch.no_grad():
        first = [run(x) for _ in range(5)]
    for a, b in itertools.pairwise(first):
        assert not torch.equal(a, b)
    with torch.no_grad():
        torch.manual_seed(3)
        a = run(x)
        b = run(x)
        torch.manual_seed(3)
        torch.testing.assert_close(run(x), a, rtol=0, atol=0)
        torch.testing.assert_close(run(x), b, rtol=0, atol=0)


def test_backward_draws_the_masks_of_its_forward(trees):
    def fn(x, w):
        return F.dropout((x @ w).tanh(), 0.5) @ w

    run, _ = compiled(fn)
    w = torch.eye(8, device=DEVICE)
    for _ in range(4):
        x = rand(8, 8).requires_grad_()
        y = run(x, w)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        torch.testing.assert_close(dx != 0, y != 0, rtol=0, atol=0)


# memory that is written --------------------------------------------------------------------------


class Decoder(nn.Module):
    """One layer with a static KV cache."""

    def __init__(self, length: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.length = length

    def forward(self, x, k_cache, v_cache, position):
        q, k, v = self.qkv(x).chunk(3, -1)
        k_cache.index_copy_(1, position, k)
        v_cache.index_copy_(1, position, v)
        mask = torch.arange(self.length, device=x.device) <= position
        scores = (q @ k_cache.transpose(1, 2)) / 4
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return x + self.out(weights @ v_cache)


@pytest.mark.parametrize("static", [True, False])
def test_a_cache_that_is_written_step_by_step(trees, static):
    model = Decoder().to(DEVICE).eval()
    run, backend = compiled(model)
    caches = [torch.zeros(1, 8, 16, device=DEVICE) for _ in range(4)]
    if static:
        for cache in caches[:2]:
            torch._dynamo.mark_static_address(cache)
    with torch.no_grad():
        for step in range(8):
            x, position = rand(1, 1, 16), torch.tensor([step], device=DEVICE)
            found = run(x, *caches[:2], position)
            torch.testing.assert_close(found, model(x, *caches[2:], position), **NEAR)
            for mine, other in zip(caches[:2], caches[2:], strict=True):
                torch.testing.assert_close(mine, other, **NEAR)
    assert trees.replays >= 5
    copied_back = ".copy_(m" in backend.reports[0].wrapper
    assert copied_back is not static


def test_a_plain_input_that_is_written(trees):
    def fn(x, y):
        x.mul_(2).add_(y @ y)
        return (x @ y).softmax(-1), x

    run, _ = compiled(fn)
    for _ in range(5):
        x, y = rand(8, 8), rand(8, 8)
        mine = x.clone()
        found, same = run(mine, y)
        wanted, _ = fn(x, y)
        torch.testing.assert_close(found, wanted, **NEAR)
        torch.testing.assert_close(mine, x, **NEAR)
        assert same is mine


@pytest.mark.parametrize("static", [True, False])
def test_what_is_written_may_lie_off_the_16_byte_boundary(trees, static):
    """Views into one flat buffer, as sharded training keeps its parameters."""

    def fn(x, y):
        x.mul_(2).add_(y)
        return x.sum()

    flat, other = (torch.arange(99.0, device=DEVICE) for _ in range(2))
    mine, wanted = flat[33:65], other[33:65]
    if static:
        torch._dynamo.mark_static_address(mine)
    run, _ = compiled(fn)
    for _ in range(5):
        y = rand(32)
        torch.testing.assert_close(run(mine, y), fn(wanted, y), **NEAR)
        torch.testing.assert_close(flat, other, **NEAR)
    assert trees.replays >= 3


def test_running_statistics(trees):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).to(DEVICE)
    other = copy.deepcopy(model)
    run, _ = compiled(model)
    for _ in range(5):
        x = rand(2, 3, 8, 8)
        torch.testing.assert_close(run(x), other(x), **NEAR)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, **NEAR)


def test_results_that_are_inputs_or_their_views(trees):
    def fn(x):
        return x, x.t(), (x @ x).relu().sum(0)

    run, _ = compiled(fn)
    for _ in range(4):
        x = rand(6, 6)
        same, view, total = run(x)
        assert same is x
        assert view.data_ptr() == x.data_ptr()
        torch.testing.assert_close(total, (x @ x).relu().sum(0), **NEAR)


def test_weights_may_be_replaced(trees):
    model = MLP().to(DEVICE).eval()
    run, _ = compiled(model)
    x = rand(4, 16)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        model.up.weight.data = rand(32, 16)
        torch.testing.assert_close(run(x), model(x), **NEAR)
        model.up.weight.mul_(2)
        torch.testing.assert_close(run(x), model(x), **NEAR)


# what cannot be captured -------------------------------------------------------------------------


def masked(x, w):
    h = (x @ w).relu()
    kept = h[h > 0]
    return (h @ w).softmax(-1), kept.sum() + (w @ w).sum()


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_what_waits_for_the_device_runs_between_graphs(trees):
    run, backend = compiled(masked)
    for _ in range(5):
        x, w = rand(8, 8), rand(8, 8)
        found, wanted = run(x, w), masked(x, w)
        torch.testing.assert_close(found, wanted, **NEAR)
    reasons = told(backend)
    assert "aten.index.Tensor: it waits for the number of places that a mask has" in reasons
    assert "test_cuda_graphs.py:" in reasons
    assert "kept = h[h > 0]" in reasons
    assert len(backend.reports[0].captures.pieces) >= 2
    assert trees.replays >= 6


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_numbers_that_the_host_reads(trees):
    def fn(x, w, n):
        h = (x @ w).relu()
        k = n.item()
        torch._check(k >= 0)
        return torch.arange(k, device=x.device) + 1, (h @ w).softmax(-1)

    run, backend = compiled(fn)
    for k in (3, 5, 3, 7, 2):
        x, w = rand(8, 8), rand(8, 8)
        found = run(x, w, torch.tensor(k, device=DEVICE))
        torch.testing.assert_close(found, fn(x, w, torch.tensor(k, device=DEVICE)), **NEAR)
    assert "it waits for the device" in told(backend)


def test_a_graph_break_leaves_two_graphs(trees):
    def fn(x, w):
        h = (x @ w).relu()
        scale = h.sum().item()
        return (h @ w).softmax(-1) * scale

    run, _ = compiled(fn)
    for _ in range(5):
        x, w = rand(8, 8), rand(8, 8)
        torch.testing.assert_close(run(x, w), fn(x, w), rtol=1e-3, atol=1e-3)


def test_branches_run_between_graphs(trees):
    def fn(x, w):
        h = (x @ w).relu()
        h = torch.cond(h.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))
        return (h @ w).softmax(-1)

    run, backend = compiled(fn)
    for _ in range(4):
        x, w = rand(8, 8), rand(8, 8)
        with torch.no_grad():
            torch.testing.assert_close(run(x, w), fn(x, w), **NEAR)
    assert "cond: it runs Python code of its own" in told(backend)


def test_a_number_on_the_cpu(trees):
    def fn(x, w, scale):
        h = (x @ w).relu() * scale
        return (h @ w).softmax(-1)

    run, backend = compiled(fn)
    for k in range(5):
        x, w, scale = rand(8, 8), rand(8, 8), torch.tensor(1.0 + k)
        torch.testing.assert_close(run(x, w, scale), fn(x, w, scale), **NEAR)
    if ON_GPU:
        assert "it works on a tensor of the CPU" in told(backend)


def test_a_chain_too_short_to_gain_runs_without(monkeypatch):
    monkeypatch.setattr(captured, "machinery", lambda device: (FakeTrees(), ""))
    run, backend = compiled(lambda x: x * 2 + 1)
    run(rand(4))
    assert "1 kernels and 0 ATen calls: a replay takes as long" in told(backend)
    assert "graph0(" not in backend.reports[0].wrapper


@cpu_only
def test_without_a_gpu_the_reason_is_told():
    model = MLP().eval()
    run, backend = compiled(model)
    with torch.no_grad():
        run(rand(4, 16))
    assert told(backend) == "not captured: there is no NVIDIA GPU to capture on"


# options and what is told ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "captures"),
    [
        ("default", False),
        ("reduce-overhead", True),
        ("max-autotune", True),
        ("max-autotune-no-cudagraphs", False),
    ],
)
def test_modes(mode, captures):
    assert Config.from_call(mode).cudagraphs is captures


def test_inductors_name_of_the_option():
    assert Config.from_call(options={"triton.cudagraphs": True}).cudagraphs
    with pytest.raises(ValueError, match="cudagraphs"):
        Config.from_call(options={"triton.cudagraphs": "yes"})


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_explain_lists_what_is_captured(trees, monkeypatch):
    monkeypatch.setenv("GEMS_CUDAGRAPHS", "1")
    explanation = gems_compile.explain(masked, rand(8, 8), rand(8, 8))
    text = " ".join(str(explanation).split())
    assert "captured as a CUDA graph" in text
    assert "it waits for the number of places that a mask has" in text
    assert explanation.why("not captured")


def test_a_written_view_is_not_captured_apart_from_its_base(trees):
    def fn(x, w):
        part = x[:4]
        part.add_(1)
        return (x @ w).softmax(-1)

    run, _ = compiled(fn)
    for _ in range(4):
        x, w = rand(8, 8), rand(8, 8)
        mine = x.clone()
        torch.testing.assert_close(run(mine, w), fn(x, w), **NEAR)
        torch.testing.assert_close(mine, x, **NEAR)


def test_embeddings_train(trees):
    table = nn.Embedding(16, 8).to(DEVICE)
    head = nn.Linear(8, 8).to(DEVICE)

    def fn(i):
        return head(table(i)).softmax(-1)

    run, _ = compiled(fn)
    for _ in range(4):
        i = ints(5, high=16)
        found = torch.autograd.grad(run(i).square().sum(), [table.weight, head.weight])
        wanted = torch.autograd.grad(fn(i).square().sum(), [table.weight, head.weight])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **NEAR)
