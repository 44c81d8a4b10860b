"""The declared ops on torch's own samples: ``op_db`` calls them in ways that ours do not.

Each sample is traced as AOTAutograd would trace it, compiled and compared with float64. A run takes
a few samples of each op, chosen by the seed in the tests' names; ``GEMS_TEST_SEED`` repeats a run,
``GEMS_TEST_FULL=1`` takes all samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, assert_same_metadata, assert_same_values
from opcheck import DECLARED, FULL, SEED, compare, options, run_poisoned, scale_of, tensors, trace
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

BASES = {name.split(".")[1]: op for name, op in DECLARED.items()}
#: op_db's names of what comes down to declared ops under another name
DECOMPOSED = {
    "softmax",
    "log_softmax",
    "nn.functional.softmin",
    "nn.functional.cross_entropy",
    "nn.functional.nll_loss",
    "nn.functional.normalize",
    "nn.functional.layer_norm",
    "nn.functional.group_norm",
    "nn.functional.instance_norm",
    "nn.functional.rms_norm",
    "nn.functional.prelu",
    "nn.functional.selu",
    "nn.functional.relu6",
    "nn.functional.glu",
    "nn.functional.logsigmoid",
    "nn.functional.softsign",
    "nn.functional.tanhshrink",
    "nn.functional.smooth_l1_loss",
    "nn.functional.huber_loss",
    "nn.functional.mse_loss",
    "nn.functional.l1_loss",
    "nn.functional.binary_cross_entropy_with_logits",
    "nn.functional.kl_div",
    "square",
    "isfinite",
    "__radd__",
    "__rsub__",
    "__rmul__",
    "__rdiv__",
    "__rpow__",
    "__rmod__",
    "__getitem__",
    "take_along_dim",
    "std_mean",
    "aminmax",
    "isclose",
    "float",
    "half",
    "bfloat16",
    "bool",
    "long",
    "to",
    "outer",
    "nanmean",
    "nansum",
    "count_nonzero",
    "linalg.vector_norm",
    "trace",
    "tril",
    "triu",
    "logcumsumexp",
    "masked.softmax",
    "diff",
    "float_power",
}
#: views, which are read by a product here
VIEWS = {
    "cat",
    "stack",
    "hstack",
    "vstack",
    "dstack",
    "flip",
    "fliplr",
    "rot90",
    "expand",
    "permute",
    "transpose",
    "t",
    "select",
    "slice",
    "narrow",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "squeeze",
    "unsqueeze",
    "reshape",
    "view",
    "flatten",
    "unflatten",
    "constant_pad_nd",
    "nn.functional.pad",
    "repeat",
    "tile",
    "movedim",
    "roll",
    "broadcast_to",
    "atleast_3d",
    "ravel",
    "diagonal",
    "unfold",
    "mT",
    "meshgrid",
}
RANDOM = {"nn.functional.dropout", "nn.functional.rrelu"}
#: they write running statistics, or rows with too large a norm: into copies, here
MUTATES = {
    "nn.functional.instance_norm",
    "nn.functional.embedding",
}
#: summed in float64 by ATen on a CPU, in float32 by CUDA and us; test_ops compares more strictly
WIDE_SUMS = {"var", "var_mean", "std", "std_mean"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}
PER_OP = 3


def _declared(info: Any) -> bool:
    names = {info.name, info.name.split(".")[-1], info.aten_name}
    return bool(names & BASES.keys()) and info.name not in RANDOM


def _cases() -> list[Any]:
    out = []
    for info in op_db:
        if not (_declared(info) or info.name in DECOMPOSED or info.name in VIEWS):
            continue
        name = f"{info.name}.{info.variant_test_name}".rstrip(".")
        out += [
            pytest.param(info, dtype, id=f"{name}-{dtype}-seed{SEED}")
            for dtype in DTYPES
            if DTYPES[dtype] in info.supported_dtypes(DEVICE)
        ]
    return out


@pytest.mark.parametrize(("info", "dtype"), _cases())
def test_sample(info: Any, dtype: str) -> None:
    torch.manual_seed(SEED)
    samples = list(info.sample_inputs(DEVICE, DTYPES[dtype], requires_grad=False))
    if not FULL and len(samples) > PER_OP:
        samples = random.Random(f"{SEED} {info.name} {dtype}").sample(samples, PER_OP)
    launches, reasons = 0, {}
    for sample in samples:
        report = _check(info, (sample.input, *sample.args), sample.kwargs)
        if report is not None:
            launches += report.launches
            reasons.update(report.aten)
    if not launches:
        pytest.skip(f"all ran as ATen: {reasons}")


def _check(info: Any, args: Any, kwargs: Any) -> Any:
    target = _pure(info)
    leaves, spec = tree_flatten((args, kwargs))
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def fn(*inputs: torch.Tensor) -> Any:
        own = list(leaves)
        for k, t in zip(places, inputs, strict=True):
            own[k] = t
        own_args, own_kwargs = tree_unflatten(own, spec)
        return target(*own_args, **own_kwargs)

    inputs = [leaves[k] for k in places]
    if not inputs or any(t.layout != torch.strided for t in inputs):
        return None
    if _has_no_answer(info, args, target, kwargs):
        return None
    graph = trace(fn, *inputs)
    got, report = run_poisoned(graph, inputs, options())
    if info.name in WIDE_SUMS:
        for a, b in zip(got, target(*args, **kwargs), strict=True):
            assert_same_metadata(a, b, info.name)
            assert_same_values(a, b, info.name)
    else:
        # three ulps of the largest result: a new draw every day meets the rare ones too
        compare(got, target, args, kwargs, info.name, _scale(info), least=3.0)
    return report


def _has_no_answer(info: Any, args: Any, target: Callable[..., Any], kwargs: Any) -> bool:
    """Whether eager refuses the sample, or divides integers by zero (which a GPU leaves open).

    A GPU's deterministic scatter of a 0-d tensor is refused with an IndexError.
    """
    divisor = args[0] if info.name.startswith("__r") else args[-1]
    if "mod" in info.name or info.name in ("remainder", "floor_divide"):
        divisor = torch.as_tensor(divisor)
        if not divisor.is_floating_point() and bool((divisor == 0).any()):
            return True
    try:
        target(*args, **kwargs)
    except NotImplementedError:
        return False
    except IndexError:
        return True
    except RuntimeError as refusal:
        return "expected scalar type" in str(refusal)
    return False


def _pure(info: Any) -> Callable[..., list[Any]]:
    """The op's tensors; a view is followed by a product, as views alone need no kernel."""

    def call(*args: Any, **kwargs: Any) -> list[Any]:
        if info.name in MUTATES:
            copy = lambda t: t.clone() if torch.is_tensor(t) else t  # noqa: E731
            args, kwargs = tree_map(copy, (args, kwargs))
        results = tensors(info.op(*args, **kwargs))
        if info.name in VIEWS:
            return [t * 2 for t in results]
        return [t.clone() for t in results]

    return call


def _scale(info: Any) -> str:
    return scale_of(BASES.get(info.name.split(".")[-1]) or BASES.get(info.aten_name))
