"""CUDA graphs' machinery: streams, threads, memory that is held, recording again, copies."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from fake_graphs import (
    MLP,
    NEAR,
    ON_GPU,
    FakeGraph,
    compiled,
    cpu_only,
    gpu_only,
    told,
    train_like_default,
)
from helpers import DEVICE, bools, gems_only, ints, rand
from torch import nn
from torch.nn import functional as F
from warmcheck import results, said

from gems_compile.lowering import apart, copies, cuda_graphs
from gems_compile.lowering.whole_graphs import FROM_CACHE, KEPT

pytestmark = gems_only


def assert_gradients_of(loss: torch.Tensor, model: nn.Module, x: torch.Tensor, **near) -> None:
    """The gradients of ``loss`` are those of the model's squares in eager mode."""
    found = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, wanted, **near)


# the machinery -----------------------------------------------------------------------------------


def test_a_profiler_sees_replays(trees):
    model = MLP().to(DEVICE).eval()
    run, _ = compiled(model)
    x = rand(4, 16)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        before = trees.replays
        with torch.profiler.profile() as profile:
            torch.testing.assert_close(run(x), model(x), **NEAR)
    assert trees.replays == before + 1
    assert any(event.key.startswith("gems ") for event in profile.key_averages())


@cpu_only
def test_only_what_moves_is_copied(trees):
    model = MLP().to(DEVICE).eval()
    run, _ = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            run(rand(4, 16))
    (graph,) = trees.graphs
    assert len(graph.copied) == 1  # x; the six weights and biases stay where they are
    assert len(graph.static) == 6


@cpu_only
def test_a_call_on_another_stream_waits_for_the_last(trees):
    model = MLP().eval()
    run, _ = compiled(model)
    x = rand(4, 16)
    with torch.no_grad():
        for stream in (1, 1, 2, 2, 1):
            trees.now = stream
            run(x)
    assert trees.waits[-2:] == [(2, 1), (1, 2)]


@cpu_only
def test_the_programs_own_graph_holds_what_it_calls(trees):
    model = MLP().eval()
    run, _ = compiled(model)
    x = rand(4, 16)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        before = trees.replays
        trees.in_capture = True
        torch.testing.assert_close(run(x), model(x), **NEAR)
        assert trees.replays == before


@cpu_only
def test_memory_that_waits_for_a_backward_is_left_alone(trees):
    model = MLP()
    run, backend = compiled(model)
    x = rand(4, 16)
    for _ in range(3):
        run(x).sum().backward()
    before = trees.replays
    trees.in_use = True
    run(x).sum().backward()
    assert trees.replays == before
    assert "while earlier results wait for a backward" in told(backend)


@cpu_only
def test_a_piece_that_is_recorded_again_and_again_is_given_up(trees, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDINGS", 4)
    model = MLP().eval()
    run, backend = compiled(model)
    x = rand(4, 16)
    with torch.no_grad():
        for _ in range(8):
            model.up.weight.data = rand(32, 16)
            torch.testing.assert_close(run(x), model(x), **NEAR)
    (graph,) = trees.graphs
    assert graph.recorded < 5
    assert "was recorded 4 times" in told(backend)


@cpu_only
def test_what_cannot_be_recorded_runs_without(trees, monkeypatch):
    def refused(self, args):
        args.clear()
        self.model.__self__.times += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeGraph, "_record", refused)
    model = MLP().eval()
    run, backend = compiled(model)
    with torch.no_grad():
        for _ in range(4):
            x = rand(4, 16)
            torch.testing.assert_close(run(x), model(x), **NEAR)
    assert "cannot be recorded (RuntimeError: operation not permitted" in told(backend)


# the real thing ----------------------------------------------------------------------------------


def test_backward_twice(trees):
    model = MLP().to(DEVICE)
    run, _ = compiled(model)
    for keep in (False, False, False, True, False):
        model.zero_grad()
        x = rand(4, 16)
        loss = run(x).square().sum()
        if keep:
            loss.backward(retain_graph=True)
            model.zero_grad()
        loss.backward()
        wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, w, **NEAR)


@gpu_only
def test_forwards_whose_backwards_come_later(trees):
    model = MLP().to(DEVICE)
    run, _ = compiled(model)
    for _ in range(4):
        inputs = [rand(4, 16) for _ in range(3)]
        losses = [run(x).square().sum() for x in inputs]
        for x, loss in [*zip(inputs, losses, strict=True)][::-1]:
            assert_gradients_of(loss, model, x, **NEAR)


@gpu_only
def test_a_loss_that_is_held_over_later_steps(trees):
    model = MLP().to(DEVICE)
    run, _ = compiled(model)
    held = []
    for step in range(10):
        x = rand(4, 16)
        loss = run(x).square().sum()
        if step in (2, 5):
            held.append((x, loss))  # its backward comes in the end
            continue
        loss.backward()
    for x, loss in held:
        assert_gradients_of(loss, model, x, **NEAR)


@gpu_only
def test_forwards_without_a_backward(trees):
    model = MLP().to(DEVICE)
    run, _ = compiled(model)
    y = None
    for _ in range(80):
        x = rand(4, 16)
        y = run(x)
        torch.testing.assert_close(y, model(x), **NEAR)


@gpu_only
def test_streams_and_threads(trees):
    model = MLP().to(DEVICE).eval()
    run, _ = compiled(model)
    failures = []

    def work(seed):
        try:
            generator = torch.Generator(DEVICE).manual_seed(seed)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(20):
                    x = torch.randn(64, 16, device=DEVICE, generator=generator)
                    torch.testing.assert_close(run(x), model(x), **NEAR)
        except Exception as e:
            failures.append(e)

    with torch.no_grad():
        run(rand(64, 16))
    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@gpu_only
def test_training_in_another_thread(trees):
    failures = []

    def work():
        try:
            train_like_default(trees)
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures[0]


@gpu_only
def test_inside_the_programs_own_graph(trees):
    model = MLP().to(DEVICE).eval()
    run, _ = compiled(model)
    x = rand(4, 16)
    with torch.no_grad():
        for _ in range(3):
            run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x)
        x.copy_(rand(4, 16))
        graph.replay()
        torch.testing.assert_close(y, model(x), **NEAR)


@gpu_only
def test_memory_stays_flat(trees):
    model = MLP(0.1).to(DEVICE)
    run, _ = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        loss = run(rand(64, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(6):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(30):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**16


def test_graphs_die_with_what_runs_them(trees):
    found = []
    known = cuda_graphs.Captured.__init__

    def noted(self, *args):
        known(self, *args)
        found.append(weakref.ref(self))

    model = MLP().to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs.Captured, "__init__", noted)
        run, backend = compiled(model)
        for _ in range(4):
            run(rand(4, 16)).sum().backward()
    model.zero_grad()
    del run, backend
    torch._dynamo.reset()
    gc.collect()
    assert [graph() for graph in found] == [None, None]


@gpu_only
def test_steps_that_are_marked(trees):
    model = MLP().to(DEVICE).eval()
    run, _ = compiled(model)
    with torch.no_grad():
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            x = rand(4, 16)
            torch.testing.assert_close(run(x), model(x), **NEAR)


@gpu_only
def test_attention_trains(trees):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(DEVICE)
    run, _ = compiled(layer)
    for _ in range(5):
        x = rand(2, 32, 64)
        assert_gradients_of(run(x).square().sum(), layer, x, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["reduce-overhead", "default"])
def test_a_graph_from_the_cache_is_captured_as_well(trees, caches, mode):
    def steps(run):
        found = []
        for _ in range(5):
            loss = run(rand(8, 16)).square().sum()
            loss.backward()
            found.append(loss.detach().clone())
        return found

    def made():
        torch.manual_seed(0)
        return MLP().to(DEVICE)

    cold, first = results(steps, made, mode="reduce-overhead")
    before = trees.replays
    warm, second = results(steps, made, mode=mode)
    torch.testing.assert_close(warm, cold, **NEAR)
    assert (trees.replays > before) is (mode == "reduce-overhead")
    assert said(first) == {KEPT}
    assert said(second) == {FROM_CACHE if mode == "reduce-overhead" else KEPT}
    if mode == "reduce-overhead":
        assert [r.captures.told() for r in second] == [r.captures.told() for r in first]


# copies ------------------------------------------------------------------------------------------


def copied(*tensors):
    return [*zip(copies.own(*tensors), tensors, strict=True)]


def test_copies_have_the_layout_of_what_they_copy():
    wide = rand(4, 6)
    kinds = [wide, wide.t(), wide[:, ::2], rand(1, 6).expand(4, 6), rand(0, 3), rand(), wide[1:]]
    kinds = [*kinds, ints(3), bools(5), rand(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    for many in (kinds, *([k] for k in kinds)):
        for copy_, tensor in copied(*many):
            assert copy_.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or (
                not tensor.numel()
            )
            assert copy_.stride() == tensor.stride()
            torch.testing.assert_close(copy_, tensor, rtol=0, atol=0)


def test_copies_share_memory_where_the_originals_do():
    whole = rand(6, 8)
    lone = rand(3)
    given = [whole[1:3], lone, whole, whole.t()[2:], whole.view(torch.int32)[4], None]
    found = copies.own_together(*given)
    for mine, tensor in zip(found, given, strict=True):
        assert (mine is None) is (tensor is None)
        if tensor is not None:
            assert mine.stride() == tensor.stride()
            torch.testing.assert_close(mine, tensor, rtol=0, atol=0)
    found[2].fill_(3)
    assert (found[0] == 3).all() and (found[3] == 3).all() and (whole != 3).any()
    assert (lone == found[1]).all()


def test_views_of_one_result_share_memory(trees):
    def fn(x):
        h = (x @ x).relu()
        return h[0], h[1:], h.t()

    run, _ = compiled(fn)
    for _ in range(4):
        x = rand(6, 6)
        a, b, c = run(x)
        torch.testing.assert_close((a, b, c), fn(x), **NEAR)
        c.fill_(2)
        assert (a == 2).all() and (b == 2).all()


class Head(nn.Module):
    """Gives its logits away, as language models do, beside their loss."""

    def __init__(self, aligned: bool) -> None:
        super().__init__()
        self.body, self.head = MLP(), nn.Linear(16, 200, bias=not aligned)
        self.aligned = aligned

    def forward(self, x, targets):
        logits = self.head(self.body(x))
        if self.aligned:  # a copy is the caller's
            logits = logits * 2
        return F.cross_entropy(logits, targets), logits


@pytest.mark.parametrize("aligned", [False, True])
def test_logits_are_made_outside_of_graphs(trees, monkeypatch, aligned):
    """They are not copied out of one, nor into that of the backward, and all else is captured."""
    monkeypatch.setattr(apart, "LARGE", 8 * 200 * 4)
    monkeypatch.setattr(apart, "BYTES", 1.0)
    model = Head(aligned).to(DEVICE)
    other = copy.deepcopy(model)
    run, backend = compiled(model)
    for _ in range(5):
        x, targets = rand(8, 16), torch.randint(200, (8,), device=DEVICE)
        losses = []
        for m in (run, other):
            loss, logits = m(x, targets)
            loss.backward()
            losses.append((loss.detach(), logits.detach()))
        torch.testing.assert_close(*losses, **NEAR)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **NEAR)
    forward, backward = backend.reports
    assert "a graph would copy a tensor" in "\n".join(forward.captures.told())
    assert forward.captures.pieces and backward.captures.pieces
    assert "own(" not in forward.wrapper
    if not ON_GPU:
        copied = [g.buffers[k] for g in trees.graphs for k in g.copied]
        assert max(map(torch.Tensor.numel, copied)) < 8 * 200
