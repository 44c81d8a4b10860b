"""State that outlives a call: buffers of modules, caches, optimizers."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Pair, assert_same, check, compile_, rand
from torch import nn


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_batch_norm_buffers(train, momentum):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum), nn.ReLU()).to(rand(1).device)
    # a cumulative mean reads its step counter, where Dynamo breaks the graph
    pair = Pair(model.train(train), fullgraph=momentum is not None)
    for _ in range(3):
        pair(rand(2, 3, 4, 4, grad=True))


def test_batch_norm_switches_between_train_and_eval():
    pair = Pair(nn.BatchNorm1d(5).to(rand(1).device))
    for train in (True, False, True):
        pair.eager.train(train)
        pair.module.train(train)
        pair(rand(6, 5, grad=True))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("last", torch.zeros(2, 5))

    def forward(self, x):
        self.steps += 1
        old = self.mean.clone()
        self.mean.lerp_(x.mean(0), 0.1)
        self.last = x * 2
        return x - old + self.mean / self.steps


def test_module_buffers():
    pair = Pair(Counter().to(rand(1).device))
    for _ in range(3):
        pair(rand(2, 5))
        assert_same(pair.module.last, pair.eager.last)


class ScaleOnce(nn.Module):
    """Reads a buffer, writes it, and reads it again in one call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x):
        before = x * self.scale
        self.scale.mul_(2)
        return before + x * self.scale


def test_buffer_read_before_and_after_the_write():
    pair = Pair(ScaleOnce().to(rand(1).device))
    for _ in range(2):
        pair(rand(3, 5))


def cache_index_copy(cache, new, position):
    cache.index_copy_(1, position, new)
    return cache


def cache_index_put(cache, new, position):
    cache[:, position] = new
    return cache


class Cache(nn.Module):
    """One attention head with a static key and value cache of 8 positions."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("k", torch.zeros(2, 8, 4))
        self.register_buffer("v", torch.zeros(2, 8, 4))

    def forward(self, q, k, v, position):
        k = self.write(self.k, k, position)
        v = self.write(self.v, v, position)
        mask = torch.arange(8, device=q.device) <= position[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])


@pytest.mark.parametrize("write", [cache_index_copy, cache_index_put], ids=lambda w: w.__name__)
def test_kv_cache(write, device):
    pair = Pair(Cache(write).to(device))
    pair(*[rand(2, 3, 4) for _ in "qkv"], torch.arange(3, device=device), context=torch.no_grad)
    for step in (3, 4, 5):
        position = torch.tensor([step], device=device)
        pair(*[rand(2, 1, 4) for _ in "qkv"], position, context=torch.no_grad)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_kv_cache_written_by_slice(dynamic):
    def fn(cache, new, start: int):
        cache[:, start : start + new.shape[1]] = new
        return cache[:, : start + new.shape[1]].sum(1), cache

    pair = Pair(fn, dynamic=dynamic)
    cache = torch.zeros_like(rand(2, 8, 4))
    for start in (0, 2, 4, 6):
        pair(cache, rand(2, 2, 4), start)


def test_kv_cache_that_grows():
    pair = Pair(lambda past, new: torch.cat([past, new], 1))
    past = rand(2, 3, 4)
    for _ in range(3):
        pair(past, rand(2, 1, 4))
        past = torch.cat([past, rand(2, 1, 4)], 1)


def test_cache_kept_in_half_precision():
    def fn(cache, new, position):
        cache.index_copy_(0, position, new.to(cache.dtype))
        return cache.float() * 2

    cache = rand(8, 4, dtype=torch.bfloat16)
    check(fn, cache, rand(2, 4), torch.tensor([5, 2], device=cache.device), exact=True)


def test_sgd_with_momentum_in_the_graph():
    def fn(w, m, g):
        with torch.no_grad():
            m.mul_(0.9).add_(g)
            w.sub_(m, alpha=0.1)

    check(fn, rand(4, 5), rand(4, 5), rand(4, 5))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizer_step_compiled(name):
    runs = []
    w = rand(4, 5)
    for wrap in (lambda step: step, lambda step: compile_(step, fullgraph=False)):
        p = nn.Parameter(w.clone())
        optimizer = getattr(torch.optim, name)([p], lr=0.1)
        step = wrap(optimizer.step)
        torch.manual_seed(3)
        for _ in range(3):
            p.grad = rand(4, 5)
            step()
        runs.append(p)
    assert_same_leaf(*runs)


def assert_same_leaf(want, got):
    assert_same(got.detach(), want.detach(), rtol=1e-4, atol=1e-5)
