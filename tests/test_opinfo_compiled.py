"""torch's own samples of every op it tests, declared here or not, through ``torch.compile``: what
AOTAutograd makes of them is compiled, and gives eager's results and gradients.

Every third op is taken by the day's seed, and one sample of it, with static or with dynamic shapes;
``GEMS_TEST_FULL=1`` takes five of all, with both.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import DEVICE, Pair, gems_only
from opcheck import FULL, SEED, tensors
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_map

pytestmark = gems_only

THIRDS, MOST = 3, 5
#: sums of another order, and gradients through them
NEAR = {"rtol": 1e-3, "atol": 1e-3}


def _is_today(name: str) -> bool:
    return FULL or (zlib.crc32(name.encode()) + SEED) % THIRDS == 0


OPS = [
    pytest.param(
        info, id=f"{info.name}{'.' * bool(info.variant_test_name)}{info.variant_test_name}"
    )
    for info in op_db
    if torch.float32 in info.dtypes
    and not info.name.startswith("jiterator")  # which compiles CUDA C++ itself
    and _is_today(info.name + info.variant_test_name)
]


def called(info: OpInfo, sample: SampleInput) -> Callable[..., Any]:
    return lambda *args: info.op(*args, **sample.kwargs)


def repeats(fn: Callable[..., Any], args: Any, grad: bool) -> bool:
    """Whether eager mode takes the call, twice with equal results: random ones are others, and what
    is empty is anything."""
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ours = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args)
        found = tensors(fn(*ours))
        if any(t.layout != torch.strided or t.is_complex() for t in found):
            return False
        seen.append(found)
    same = zip(*seen, strict=True)
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in same):
        return False
    out = [t for t in tensors(fn(*args)) if t.grad_fn is not None]
    if grad and out:
        torch.autograd.backward(out, [torch.ones_like(t) for t in out])
    return True


def samples(info: OpInfo, grad: bool) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    torch.manual_seed(SEED)
    found = list(info.sample_inputs(DEVICE, torch.float32, requires_grad=grad))
    random.Random(SEED).shuffle(found)
    left = MOST if FULL else 1
    for sample in found:
        fn, args = called(info, sample), (sample.input, *sample.args)
        try:
            if not repeats(fn, args, grad):
                continue
        except (RuntimeError, NotImplementedError, TypeError):  # eager's own
            continue
        yield fn, args
        left -= 1
        if not left:
            return


@pytest.mark.parametrize("info", OPS)
def test_op(info: OpInfo) -> None:
    by_seed = bool(zlib.crc32(info.name.encode()) // THIRDS + SEED & 1)
    seen = 0
    for fn, args in samples(info, info.supports_autograd):
        for dynamic in (False, True) if FULL else (by_seed,):
            torch._dynamo.reset()
            pair = Pair(fn, dynamic=dynamic, fullgraph=False)
            try:
                pair(*args, grad=info.supports_autograd, **NEAR)
            except torch._dynamo.exc.TorchRuntimeError:  # Dynamo cannot trace it for any backend
                continue
            except torch._dynamo.exc.BackendCompilerFailed as e:
                if "Cannot call numel() on tensor with symbolic sizes" not in str(e):
                    raise
                continue  # nor AOTAutograd, in torch's own C++: the gradient of trace in torch 2.11
            seen += 1
    if not seen:
        pytest.skip("eager mode has no sample with defined results")
