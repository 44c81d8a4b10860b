"""torch's own samples of all its ops behind eager PyTorch, with every op of ours on: forward,
backward, non-contiguous, in place and ``out=``, against what ATen does and float64.

A run takes a share of the ops and few samples of each, chosen by the seed in the tests' names;
``GEMS_TEST_SEED`` repeats a run, ``GEMS_TEST_FULL=1`` takes all ops and many samples, ``--quick``
one of each. With ``--ref cpu`` ATen's numbers are those of its CPU kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate, error_in_ulps, in_float64
from eagercheck import every_op, nothing_left  # noqa: F401
from helpers import DEVICE, assert_same_metadata, assert_same_values
from opcheck import FULL, QUICK, REF, SEED, tensors
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_map

import gems_compile
from gems_compile import eager
from gems_compile.calls import varying

DTYPES = ("float32", "bfloat16", "int64", "float16", "int32", "uint8", "bool", "complex64")
DTYPES = DTYPES[:3] if QUICK else DTYPES
PER_OP = 1 if QUICK else 8 if FULL else 2
SHARE = 40  # cases of a run that is not full
LARGEST = 3000  # elements of a sample on a CPU: the interpreter is slow

#: ops that no kernel of ours comes near, and whose samples take long or need libraries
APART = ("linalg.", "fft.", "sparse.", "signal.", "to_sparse", "jiterator")
#: ops whose results nobody has written, or whose places are all they tell
UNSAID = ("empty", "new_empty", "argsort")
#: ops that tell places: of equal elements any; their values are compared (more: test_sorting.py)
PLACES = ("sort", "msort", "topk", "kthvalue", "median", "nanmedian", "mode")
#: (op, dtype or "") -> why results need not be ATen's
KNOWN: dict[tuple[str, str], str] = {
    (
        "nn.functional.soft_margin_loss",
        "float16",
    ): "ATen's exp overflows, as it rounds between its steps; ours is right",
    (
        "torch.ops.aten._safe_softmax.default",
        "",
    ): "its gradient cancels, and ours rounds a product that the compiler of ATen contracts",
}
if DEVICE == "cuda":
    undefined = "what is left of a division by zero is undefined on a GPU"
    KNOWN |= {("__rmod__", dtype): undefined for dtype in ("uint8", "int32", "int64")}
    KNOWN["clamp", "uint8"] = "ATen's clamp_ of bytes with 32-bit bounds is not what its CPU's is"
    KNOWN["_upsample_bilinear2d_aa", "float32"] = "sums of few weights round otherwise: 5.3 ulps"


def cases() -> list[Any]:
    found = []
    for info in op_db:
        if info.name.startswith(APART):
            continue
        name = f"{info.name}.{info.variant_test_name}".rstrip(".")
        found += [
            pytest.param(info, dtype, id=f"{name}-{dtype}-seed{SEED}")
            for dtype in DTYPES
            if getattr(torch, dtype) in info.supported_dtypes(DEVICE)
        ]
    return found if FULL else random.Random(SEED).sample(found, SHARE)


@pytest.fixture(autouse=True)
def any_order() -> None:
    """Sums may be atomic: where deterministic algorithms are asked for, scatters are ATen's."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def any_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run of a share, kernels of every other case take any sizes from the first call on; in
    one of all, ``--any-sizes`` says so."""
    if not FULL and random.Random(f"{SEED} {request.node.name}").random() < 0.5:
        monkeypatch.setattr(varying, "OWN_SIZES", 0)


@pytest.mark.parametrize(("info", "dtype"), cases())
def test_op(info: Any, dtype: str) -> None:
    if why := KNOWN.get((info.name, dtype)) or KNOWN.get((info.name, "")):
        pytest.skip(why)
    names = every_op()
    for sample in samples(info, dtype):
        for way, call in ways(info, sample):
            want = outcome(call, reference)
            if want is None:  # ATen refuses it
                continue
            again = outcome(call, reference, seed=1)
            drawn = again is None or not all(map(same_bits, want, again))
            drawn |= info.name.startswith(UNSAID)
            with gems_compile.use_gems(only=names):
                torch.manual_seed(0)
                got = [t.detach() for t in call(own)]  # ATen takes it, so we do
            sure = 0 if drawn else 1 if info.name in PLACES else len(want)
            compare(got, want, call, sure, f"{info.name}, {way}")
    if not any(row["ours"] for row in eager.stats().values()):
        pytest.skip("all of its calls are ATen's")


def samples(info: Any, dtype: str) -> list[Any]:
    torch.manual_seed(SEED)
    kind = getattr(torch, dtype)
    grad = info.supports_autograd and (kind.is_floating_point or kind.is_complex)
    # all of them: some generators hold torch's settings until their end
    found = list(info.sample_inputs(DEVICE, kind, requires_grad=grad))
    given = [s for s in found if plain(s)]
    return random.Random(f"{SEED} {info.name} {dtype}").sample(given, min(PER_OP, len(given)))


def plain(sample: Any) -> bool:
    every = tensors((sample.input, sample.args, sample.kwargs))
    small = DEVICE != "cpu" or sum(t.numel() for t in every) <= LARGEST
    return small and all(type(t) is Tensor and t.layout == torch.strided for t in every)


Call = Callable[[Callable[[Any], Any]], list[Tensor]]


def ways(info: Any, sample: Any) -> Iterator[tuple[str, Call]]:
    """The ways to call an op on a sample. Each takes what is done to all tensors first, and returns
    results, gradients, and what was written."""
    yield "plain", lambda change: run(info.op, sample, change)
    try:
        yield "gaps", lambda change: run(info.op, sample.noncontiguous(), change)
    except RuntimeError:  # of a view, say
        return
    if info.inplace_variant is not None:
        yield "in place", lambda change: run(info.inplace_variant, sample, change, written=True)
    if info.supports_out:
        yield "out=", lambda change: into(info.op, sample, change)


def run(op: Any, sample: Any, change: Any, written: bool = False) -> list[Tensor]:
    given = change((sample.input, sample.args, sample.kwargs))
    leaves = [t.requires_grad_(t.requires_grad and not written) for t in tensors(given)]
    leaves = [] if written else [t for t in leaves if t.requires_grad]
    value, args, kwargs = given
    out = tensors(op(value, *args, **kwargs))
    used = [t for t in out if t.requires_grad and t.is_floating_point()]
    if not used or not leaves:
        return [*out, *tensors(given)]
    torch.manual_seed(3)
    # numbers of every dtype, moved where the operands are
    cotangents = change([torch.randn(t.shape).bfloat16().to(t) for t in used])
    found = torch.autograd.grad(used, leaves, cotangents, allow_unused=True)
    return [*out, *(t for t in found if t is not None)]


def into(op: Any, sample: Any, change: Any) -> list[Tensor]:
    value, args, kwargs = tree_map(detached, change((sample.input, sample.args, sample.kwargs)))
    made = op(value, *args, **kwargs)
    places = tree_map(lambda t: torch.full_like(t, 7) if isinstance(t, Tensor) else t, made)
    op(value, *args, **kwargs, out=places)
    return tensors(places)


def detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def own(tree: Any) -> Any:
    """The same tensors in memory of their own."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = torch.empty_like(leaf).copy_(leaf.detach())
        if not leaf.is_contiguous() and leaf.numel():
            wide = leaf.new_zeros((*leaf.shape, 2)) if leaf.ndim else leaf.new_zeros((2,))
            copy = wide[..., 0].copy_(leaf.detach())
        return copy.detach().requires_grad_(leaf.requires_grad)

    return tree_map(one, tree)


def reference(tree: Any) -> Any:
    """The same where ATen is to compute, on a CPU if that was asked for."""
    if REF == "device":
        return own(tree)
    return tree_map(
        lambda t: t.detach().cpu().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t,
        own(tree),
    )


def outcome(call: Call, change: Callable[[Any], Any], seed: int = 0) -> list[Tensor] | None:
    """Detached results; None where torch refuses the call."""
    torch.manual_seed(seed)
    try:
        return [t.detach() for t in call(change)]
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None


def exactly(
    call: Call, want: list[Tensor], shift: float = 0.0, turn: int = 0
) -> list[Tensor] | None:
    """In float64 on the CPU, of operands that are off by ``shift`` of themselves, others in each
    turn; None where that is another computation."""
    torch.manual_seed(0)

    def change(tree: Any) -> Any:
        grads = [t.requires_grad for t in tensors(tree)]
        wide = in_float64(tree, floats_only=True)
        for t, grad in zip(tensors(wide), grads, strict=True):
            if t.is_floating_point():
                off = (
                    torch.rand(t.shape, generator=torch.Generator().manual_seed(t.numel() + turn))
                    - 0.5
                )
                t.mul_(1 + 2 * shift * off)
            t.requires_grad_(grad and t.is_floating_point())
        return wide

    try:
        found = [t.detach() for t in call(change)]
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    same = [
        a.shape == b.shape and a.is_floating_point() == b.is_floating_point()
        for a, b in zip(found, want, strict=False)
    ]
    return found if len(found) == len(want) and all(same) else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def compare(got: list[Tensor], want: list[Tensor], call: Call, sure: int, name: str) -> None:
    """Of the results beyond ``sure`` nothing but the layout is promised."""
    assert len(got) == len(want)
    if REF == "device":
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same_metadata(a, b, f"{name}, result {k}")
    exact = exactly(call, want) if sure else None
    for k, (a, b) in enumerate(zip(got[:sure], want[:sure], strict=True)):
        what, a, b = f"{name}, result {k}", a.cpu(), b.cpu()
        if not b.is_floating_point() or exact is None:
            assert_same_values(a, b, what)
            continue

        def usual(k: int = k, b: Tensor = b) -> float:
            """Where results hang on the last place of the operands (sums whose terms cancel, say)
            so much error is nobody's."""
            moved = [exactly(call, want, torch.finfo(b.dtype).eps, turn) for turn in range(4)]
            errors = [error_in_ulps(m[k], exact[k], b.dtype, "tensor") for m in moved if m]
            return 2 * max(errors, default=0.0)

        assert_accurate(a, b, exact[k], what, "tensor", usual, least=4.0)
