"""``gems_compile.modules`` in place of torch's and transformers' modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, compile_, gems_only, ints, rand
from llm_cases import llama_norm, rotary
from torch import Tensor, nn

from gems_compile import modules, own_ops
from gems_compile.errors import ArgumentError

pytestmark = gems_only


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As whoever imports `gems_compile.llm` has it; counts begin anew."""
    monkeypatch.setattr("gems_compile.kernels.served._server", own_ops.serve)
    own_ops._handlers.clear()


WIDTH, HEADS, KEYS, HIDDEN, WORDS = 32, 4, 2, 48, 61
SIZE = WIDTH // HEADS


class LlamaNorm(nn.Module):
    """As transformers has it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return llama_norm(x, self.weight, self.variance_epsilon)


class Layer(nn.Module):
    """One layer of Llama, with its embedding and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, KEYS * SIZE, bias=False)
        self.v_proj = nn.Linear(WIDTH, KEYS * SIZE, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.add_modules()

    def add_modules(self) -> None:
        self.input_norm, self.post_norm, self.norm = (LlamaNorm(WIDTH) for _ in range(3))
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, SIZE)).transpose(1, 2) for t in parts)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KEYS, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        q, k, v = self.heads(self.input_norm(h))
        cos, sin = angles(q)
        h = h + self.attend(*rotary(q, k, cos, sin), v)
        gate, up = self.gate_up(self.post_norm(h)).chunk(2, -1)
        h = self.norm(h + self.down(F.silu(gate) * up))
        logits = self.lm_head(h[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class FusedLayer(Layer):
    """The same of our modules."""

    def add_modules(self) -> None:
        self.input_norm, self.post_norm, self.norm = (modules.RMSNorm(WIDTH) for _ in range(3))
        self.rotary, self.act = modules.RotaryEmbedding(SIZE, 16), modules.SiluAndMul()
        self.lm_head = modules.LinearCrossEntropy(WIDTH, WORDS, chunk=8)

    def forward(self, ids: Tensor) -> Tensor:
        residual = self.embed(ids)
        q, k, v = self.heads(self.input_norm(residual))
        q, k = self.rotary(q, k)
        x, residual = self.post_norm(self.attend(q, k, v), residual)
        x, _ = self.norm(self.down(self.act(self.gate_up(x))), residual)
        return self.lm_head(x[:, :-1], ids[:, 1:])


def angles(q: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [1, S, R] as transformers computes them."""
    inverse = 1.0 / (10000.0 ** (torch.arange(0, SIZE, 2, device=q.device).float() / SIZE))
    found = torch.arange(q.shape[2], device=q.device).float()[:, None] * inverse
    found = torch.cat((found, found), -1)[None]
    return found.cos().to(q.dtype), found.sin().to(q.dtype)


def trained(model: nn.Module, run: Any) -> list[float]:
    """The losses of three steps."""
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = run(ints(2, 9, high=WORDS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_llama_layer_trains_the_same(compiled: bool) -> None:
    plain, fused = Layer().to(DEVICE), FusedLayer().to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    run = compile_(fused) if compiled else fused
    for a, b in zip(trained(fused, run), trained(plain, plain), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    kernels = {name for name, row in own_ops.stats().items() if row["ours"]}
    assert compiled or kernels >= {"rms_norm", "fused_add_rms_norm", "rotary", "packed_act_and_mul"}


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_rms_norm_of_torch() -> None:
    theirs = nn.RMSNorm(33, eps=1e-5).to(DEVICE)
    ours = modules.RMSNorm(33, eps=1e-5, weight_after_cast=False).to(DEVICE)
    theirs.weight.data.normal_()
    same_state(theirs, ours)
    x = rand(4, 33)
    torch.testing.assert_close(ours(x), theirs(x))
    assert repr(ours) == "RMSNorm((33,), eps=1e-05)"


def test_layer_norm() -> None:
    ours, theirs = modules.LayerNorm(33).to(DEVICE), nn.LayerNorm(33).to(DEVICE)
    nn.init.normal_(ours.bias)
    same_state(ours, theirs)
    x, residual = rand(4, 33), rand(4, 33)
    torch.testing.assert_close(ours(x), theirs(x))
    y, h = ours(x, residual)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, theirs(x + residual))
    with pytest.raises(ArgumentError, match=r"LayerNorm over \(4, 33\) takes no residual"):
        modules.LayerNorm((4, 33)).to(DEVICE)(x, residual)


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions(interleaved: bool) -> None:
    """A batch whose rows stand at other places than 0, 1, ... and in no order."""
    module = modules.RotaryEmbedding(6, 20, interleaved=interleaved).to(DEVICE)
    q, k = rand(2, 4, 5, 8), rand(2, 2, 5, 8)
    places = ints(2, 5, high=20)
    got = module(q, k, places)
    for row in range(2):
        one = module(q[row : row + 1], k[row : row + 1], places[row])
        for a, b in zip(got, one, strict=True):
            torch.testing.assert_close(a[row : row + 1], b)
    for a, b in zip(module(q, k), module(q, k, torch.arange(5, device=DEVICE)), strict=True):
        torch.testing.assert_close(a, b)
    assert not module.state_dict()


def test_products_of_turned_rows_depend_on_their_distance() -> None:
    module = modules.RotaryEmbedding(8, 20).to(DEVICE)
    q, k = rand(1, 1, 1, 8).expand(1, 1, 20, 8), rand(1, 1, 1, 8).expand(1, 1, 20, 8)
    turned_q, turned_k = module(q, k)
    scores = (turned_q @ turned_k.mT)[0, 0]
    for distance in range(3):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


def test_places_beyond_the_tables() -> None:
    module = modules.RotaryEmbedding(6, 20).to(DEVICE)
    with pytest.raises(ArgumentError, match="q has 21 positions; there are tables for max_pos"):
        module(rand(1, 1, 21, 8), rand(1, 1, 21, 8))
    with pytest.raises(ArgumentError, match="dim is 7; valid: an even number"):
        modules.RotaryEmbedding(7)


def test_activations() -> None:
    x, up = rand(4, 34), rand(4, 17)
    gate, rest = x.chunk(2, -1)
    torch.testing.assert_close(modules.SiluAndMul()(x), F.silu(gate) * rest)
    torch.testing.assert_close(modules.SiluAndMul()(gate, up), F.silu(gate) * up)
    tanh = modules.GeluAndMul("tanh")
    torch.testing.assert_close(tanh(x), F.gelu(gate, approximate="tanh") * rest)
    torch.testing.assert_close(modules.GeluAndMul()(gate, up), F.gelu(gate) * up)
    assert repr(tanh) == "GeluAndMul(approximate='tanh')"


def test_losses() -> None:
    logits, target = rand(6, 40), ints(6, high=40)
    target[2] = 7
    settings = {"ignore_index": 7, "reduction": "sum", "label_smoothing": 0.2}
    want = nn.CrossEntropyLoss(**settings)(logits, target)
    torch.testing.assert_close(modules.CrossEntropyLoss(**settings)(logits, target), want)
    ours = modules.LinearCrossEntropy(8, 40, bias=True, **settings).to(DEVICE)
    theirs = nn.Linear(8, 40).to(DEVICE)
    same_state(ours, theirs)
    hidden = rand(6, 8)
    want = nn.CrossEntropyLoss(**settings)(theirs(hidden), target)
    torch.testing.assert_close(ours(hidden, target), want)
