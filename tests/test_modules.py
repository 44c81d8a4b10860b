"""torch's own samples of every ``nn.Module``, compiled with static and with dynamic shapes: two
training steps, or two of inference, beside eager's; results, gradients and buffers.

One sample of each module is taken by the day's seed; ``GEMS_TEST_FULL=1`` takes all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, Pair, check, compile_, gems_only, rand
from opcheck import FULL, SEED
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db

import gems_compile
from gems_compile import backend
from gems_compile.lowering import decompose

pytestmark = gems_only

#: what draws numbers, of which ours are others
DRAWS = ("Dropout", "RReLU", "FractionalMaxPool")
CASES = [
    pytest.param(info, training, dynamic, id=f"{info.name}-{how}-{shapes}")
    for info in module_db
    if not any(name in info.name for name in DRAWS)
    for training, how in ((True, "train"), (False, "eval"))
    for dynamic, shapes in ((False, "static"), (True, "dynamic"))
]


class Called(nn.Module):
    """A module, called with what a sample calls it with by name."""

    def __init__(self, module: nn.Module, by_name: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.by_name = module, by_name

    def forward(self, *args: Any) -> Any:
        return self.module(*args, **self.by_name)


def samples(info: ModuleInfo, training: bool) -> Iterator[tuple[nn.Module, ModuleInput]]:
    """Those that eager mode takes."""
    torch.manual_seed(SEED)
    how = {"device": DEVICE, "dtype": torch.float32, "requires_grad": True, "training": training}
    found = list(info.module_inputs_func(info, **how))
    random.Random(SEED).shuffle(found)
    for sample in found:
        made, given = sample.constructor_input, sample.forward_input
        if given is None or _misdescribed(info, sample):
            continue
        try:
            module = info.module_cls(*made.args, **made.kwargs).to(DEVICE).train(training)
            module(*given.args, **given.kwargs)
        except (RuntimeError, NotImplementedError, ValueError):  # of a CPU, say
            continue
        yield module, given


def _misdescribed(info: ModuleInfo, sample: ModuleInput) -> bool:
    """Whether torch's FakeTensor has another shape than the result, for all backends."""
    lone = info.name == "nn.MultiLabelMarginLoss" and sample.forward_input.args[0].ndim == 1
    return lone and sample.constructor_input.kwargs.get("reduction") == "none"


@pytest.mark.parametrize(("info", "training", "dynamic"), CASES)
def test_module(info: ModuleInfo, training: bool, dynamic: bool) -> None:
    seen = 0
    for module, given in samples(info, training):
        torch._dynamo.reset()
        pair = Pair(Called(module, given.kwargs), dynamic=dynamic, fullgraph=False)
        for _ in range(2):
            pair(*given.args, grad=training, rtol=1e-4, atol=1e-4)
        seen += 1
        if not FULL:
            break
    if not seen:
        pytest.skip("eager mode takes no sample here")


def test_a_rule_of_torchs_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The graph is compiled all the same, of ops that are whole; in strict mode it is an error."""

    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("there is no such module")

    rules = {**decompose.Decompositions(False), torch.ops.aten.mse_loss.default: broken}
    monkeypatch.setattr(backend, "Decompositions", lambda own_rng: rules)
    x, y = rand(5, 7, grad=True), rand(5, 7)

    def program(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss((x * 2).tanh() + 1, y)

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="there is no such module"):
        compile_(program)(x, y)
    torch._dynamo.reset()
    monkeypatch.setenv("GEMS_STRICT", "0")
    check(program, x, y)
    assert "is not taken apart: AttributeError: there is no such module" in caplog.text
    forward = next(r for r in gems_compile.reports() if r.kind == "forward")
    assert forward.launches == 1 and any("mse_loss" in why for why in forward.aten)
