"""Eager mode beside the rest of torch: small models train alike with and without every op of ours,
checkpointed, under autocast, scaled, compiled, from several threads and with hooks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eagercheck import every_op, nothing_left, ours  # noqa: F401
from helpers import DEVICE, assert_same, ints, rand
from opcheck import FULL, SEED
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gems_compile
from gems_compile import eager

STEPS = 2
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


# models ------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24),
        nn.LayerNorm(24),
        nn.GELU(),
        nn.Linear(24, 12),
        nn.SiLU(),
        nn.Linear(12, 5),
    )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(2, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), Residual(4), nn.MaxPool2d(2), Residual(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


class Llama(nn.Module):
    """A layer of transformers' Llama, grouped queries and all."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
            attn_implementation="eager", use_cache=False,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits.flatten(0, 1)


class Problem:
    """A model, and batches of inputs and targets."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        make, inputs = {
            "mlp": (mlp, lambda: rand(6, 12)),
            "conv_net": (conv_net, lambda: rand(3, 3, 8, 8)),
            "llama": (Llama, lambda: ints(2, 7, high=40)),
        }[name]
        self.first = make().to(DEVICE)
        self.batches = [inputs() for _ in range(STEPS)]
        with torch.no_grad():
            shapes = copy.deepcopy(self.first)(self.batches[0]).shape
        self.target = ints(shapes[0], high=shapes[1])

    def train(
        self,
        run: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
        around: Callable[[], Any] = nullcontext,
        scaler: Any = None,
    ) -> list[Tensor]:
        """The losses of some steps, and the state that they led to."""
        torch.manual_seed(1)
        model = copy.deepcopy(self.first)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, eps=1e-3)  # no noise to 1
        losses = []
        for x in self.batches:
            optimizer.zero_grad()
            with around():
                loss = F.cross_entropy(run(model, x), self.target)
            if scaler is None:
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            losses.append(loss.detach())
        return [*losses, *(t.detach() for t in model.state_dict().values())]


MODELS = ["mlp", "conv_net", "llama"]
if not FULL and DEVICE == "cpu":  # where each takes seconds: one of the larger two a day
    MODELS.pop(1 + SEED % 2)
models = pytest.mark.parametrize("name", MODELS)


def alike(train: Callable[[], list[Tensor]], served: int = 10, **tolerance: float) -> None:
    """The same training, native and with every op of ours, which served so many calls."""
    want = train()
    with gems_compile.use_gems(only=every_op()):
        got = train()
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(a, b, f"tensor {k}", **(tolerance or TOLERANCE))
    assert sum(row["ours"] for row in eager.stats().values()) >= served


# training ----------------------------------------------------------------------------------------


@models
def test_training(name: str) -> None:
    alike(Problem(name).train, served=50)


@pytest.mark.parametrize("reentrant", [False, True])
@models
def test_checkpoint(name: str, reentrant: bool) -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        if x.is_floating_point():
            x = x.clone().requires_grad_()  # or reentrant checkpoints have no gradient
        if isinstance(model, nn.Sequential):
            return checkpoint_sequential(model, 2, x, use_reentrant=reentrant)
        model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.model.enable_input_require_grads()
        return model(x)

    alike(lambda: Problem(name).train(run))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_draws_the_same_mask(reentrant: bool) -> None:
    """Random ops of ours, called again in backward, draw from the state that was saved."""
    x = (rand(16, 16).abs() + 1).requires_grad_()
    with gems_compile.use_gems(only=["native_dropout", "bernoulli_", "rand_like", "mul"]):
        out = checkpoint(lambda x: x * (torch.rand_like(x) > 0.5), x, use_reentrant=reentrant)
        out.sum().backward()
    assert ours("rand_like") == 2
    assert 0 < (out == 0).sum() < out.numel()
    assert torch.equal(x.grad, (out != 0).to(x.dtype))


@models
def test_autocast(name: str) -> None:
    def around() -> Any:
        return torch.autocast(DEVICE, torch.bfloat16)

    alike(lambda: Problem(name).train(around=around), rtol=0.1, atol=0.03)


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_grad_scaler(name: str) -> None:
    def train() -> list[Tensor]:
        return Problem(name).train(scaler=torch.amp.GradScaler(DEVICE, init_scale=256.0))

    alike(train)


def test_grad_scaler_skips_a_step_that_overflows() -> None:
    weight = nn.Parameter(rand(4))
    before = weight.detach().clone()
    scaler, optimizer = torch.amp.GradScaler(DEVICE), torch.optim.SGD([weight], 0.1)
    with gems_compile.use_gems(only=every_op()):
        scaler.scale((weight * float("inf")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(weight.detach(), before)
    assert scaler.get_scale() == 2.0**15


@models
def test_deterministic_algorithms(name: str) -> None:
    """Two runs are equal bit for bit where that is asked for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    problem = Problem(name)
    with gems_compile.use_gems(only=every_op()):
        first, second = problem.train(), problem.train()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# torch.func, hooks, threads -----------------------------------------------------------------------


def test_functional_call() -> None:
    """Gradients of each sample of a model without state of its own."""
    model, x, target = mlp().to(DEVICE), rand(4, 12), ints(4, high=5)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: Any, x: Tensor, target: Tensor) -> Tensor:
        out = torch.func.functional_call(model, weights, (x[None],))
        return F.cross_entropy(out, target[None])

    def slopes() -> list[Tensor]:
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        return list(per_sample(weights, x, target).values())

    alike(slopes)


def test_hooks_see_the_same_gradients() -> None:
    def train() -> list[Tensor]:
        torch.manual_seed(0)
        model, seen = mlp().to(DEVICE), []
        keep = lambda *what: seen.extend(t.detach().clone() for t in what)  # noqa: E731
        model[2].register_full_backward_hook(lambda _, down, up: keep(*down, *up))
        model[1].register_forward_hook(lambda _, args, out: keep(*args, out))
        model[0].weight.register_hook(lambda g: (keep(g), g * 2)[1])
        model[3].weight.register_post_accumulate_grad_hook(lambda p: keep(p.grad))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            out = model(rand(3, 12))
        out.square().sum().backward()
        return [*seen, *(p.grad for p in model.parameters())]

    alike(train)


def test_backward_from_many_threads() -> None:
    """Graphs of one model, and of one input, at once."""
    torch.manual_seed(0)
    model, x = mlp().to(DEVICE), rand(4, 12)

    def gradients(scale: float) -> list[Tensor]:
        out = model(x * scale).square().sum()
        return list(torch.autograd.grad(out, list(model.parameters())))

    scales = [1.0, 2.0, 3.0, 4.0]
    want = [gradients(s) for s in scales]
    got: list[Any] = [None] * len(scales)

    def work(k: int) -> None:
        got[k] = [gradients(scales[k]) for _ in range(3)]

    with gems_compile.use_gems(only=every_op()):
        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(scales))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for found, wanted in zip(got, want, strict=True):
        for again in found:
            for a, b in zip(again, wanted, strict=True):
                assert_same(a, b, **TOLERANCE)
    assert ours("native_layer_norm") == 12


def test_anomaly_mode_names_the_op() -> None:
    x = rand(4).requires_grad_()
    with (
        gems_compile.use_gems(only=every_op()),
        torch.autograd.set_detect_anomaly(True, check_nan=True),
        pytest.warns(UserWarning, match="Error detected in SqrtBackward"),
        pytest.raises(RuntimeError, match="returned nan"),
    ):
        ((x * 0).sqrt() * 0).sum().backward()


class Activated(torch.utils.data.Dataset):
    """What workers compute, in processes that inherit what is registered."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, k: int) -> Tensor:
        return F.gelu(torch.arange(8.0) - k).softmax(-1)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_a_data_loader(how: str) -> None:
    def loaded() -> Tensor:
        loader = torch.utils.data.DataLoader(
            Activated(), 2, num_workers=2, multiprocessing_context=how
        )
        return torch.cat(list(loader))

    want = torch.stack([Activated()[k] for k in range(6)])
    with gems_compile.use_gems(only=every_op()):
        Activated()[0]  # so that a fork has a compiled kernel, and locks that were held
        assert_same(loaded(), want)


# compiled code -----------------------------------------------------------------------------------


def graphs_of(fn: Callable[..., Any], *args: Any) -> list[str]:
    """The code of the graphs that Dynamo captures."""
    torch._dynamo.reset()
    found: list[str] = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(gm.code)
        return gm

    torch.compile(fn, backend=backend)(*args)
    return found


@models
def test_dynamo_captures_the_same(name: str) -> None:
    problem = Problem(name)
    model, x = problem.first, problem.batches[0]
    want = graphs_of(model, x)
    with gems_compile.use_gems(only=every_op()):
        assert graphs_of(model, x) == want


@pytest.mark.parametrize(
    ("name", "backend"),
    [(n, b) for n in MODELS for b in ("gems", "aot_eager")] + [("mlp", "inductor")],
)
def test_compiled_training(name: str, backend: str) -> None:
    """Compiled before, within and after a block: the same numbers, and one compile."""
    problem = Problem(name)
    want = problem.train()
    step = torch.compile(lambda model, x: model(x), backend=backend)
    counters = torch._dynamo.utils.counters["stats"]
    got = [problem.train(step)]
    model = copy.deepcopy(problem.first)
    forward = torch.compile(model, backend=backend)
    outs = [forward(problem.batches[0])]
    before = counters["unique_graphs"]
    with gems_compile.use_gems(only=every_op()):
        outs.append(forward(problem.batches[0]))
        assert counters["unique_graphs"] == before, "compiled anew in the block"
        got.append(problem.train(step))
    within = counters["unique_graphs"]
    outs.append(forward(problem.batches[0]))
    assert counters["unique_graphs"] == within, "compiled anew after the block"
    for found in got:
        for a, b in zip(found, want, strict=True):
            assert_same(a, b, **TOLERANCE)
    if name != "conv_net":  # whose running statistics move
        for out in outs[1:]:
            assert_same(out.detach(), outs[0].detach())
