"""In-place and out= overloads behind eager PyTorch, on the samples of the op they are forms of."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, assert_same_metadata
from opcheck import SEED, calls, make, tensors
from torch import Tensor
from torch.utils._pytree import tree_map

import gems_compile
from gems_compile import eager, forms, one_op
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import current_target

Sample = tuple[tuple[Any, ...], dict[str, Any]]
aten = torch.ops.aten
LARGEST = 5000  # elements of a sample: the interpreter is slow

#: forms with a kernel that no call comes to
ATENS = {
    "aten.clone.out": "it only copies",
    "aten.cumsum_.default": "what is not yet added up would be written over",
    "aten.cumprod_.default": "what is not yet multiplied would be written over",
    "aten._native_batch_norm_legit_no_training.out": "its saved statistics are empty",
}


def samples(name: str, count: int) -> list[Sample]:
    """Some calls of a functional overload, others for another seed."""
    dtype = "float32" if "float32" in OPS[name].dtypes else OPS[name].dtypes[0]
    found = [make(call, dtype) for call in calls(name)]
    found = [s for s in found if all(t.numel() for t in tensors(s))] or found
    return random.Random(f"{name} {SEED}").sample(found, min(count, len(found)))


def copied(sample: Sample) -> Sample:
    """The same call on memory of its own."""
    return tree_map(lambda a: a.clone() if torch.is_tensor(a) else a, sample)


# what writes -------------------------------------------------------------------------------------


def place_like(t: Tensor, gaps: bool) -> Tensor:
    """A place for a result, which holds something else; with gaps that must stay as they are."""
    if gaps and t.ndim:
        return t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 7)[..., ::2]
    return torch.full_like(t, 7)


def places_of(form: forms.Form, sample: Sample, gaps: bool) -> tuple[Sample, list[Tensor]] | None:
    """A call of the form on memory of its own, and what it writes; None where the functional
    overload returns less than the form writes."""
    args, kwargs = copied(sample)
    if form.kind == forms.IN_PLACE:
        place = place_like(args[0], gaps).copy_(args[0])
        return ((place, *args[1:]), kwargs), [place]
    results = tensors(form.functional(*args, **kwargs))
    if len(results) < len(form.written):
        return None
    places = [place_like(t, gaps) for t in results]
    return (args, {**kwargs, **dict(zip(form.written, places, strict=True))}), places


@pytest.mark.parametrize("name", list(eager._forms()))
def test_writes(name: str) -> None:
    """The functional overload's results where they belong, and nothing else; what is returned is
    what was given."""
    if why := eager.why_not_replaced(name, current_target()):
        pytest.skip(why)
    form, served = eager._forms()[name], 0
    aten_name = one_op.aten_name(form.overload)
    for k, sample in enumerate(samples(str(form.functional), 3)):
        made, wanted = (places_of(form, sample, bool(k % 2)) for _ in range(2))
        if made is None or wanted is None:
            continue
        results = tensors(form.functional(*sample[0], **sample[1]))
        for place, result in zip(wanted[1], results, strict=True):
            if place.shape == result.shape:
                place.copy_(result)
        (args, kwargs), places = made
        before = ours(aten_name)
        try:
            with gems_compile.use_gems(only=[name]):
                got = tensors(form.overload(*args, **kwargs))
        except RuntimeError:  # ATen's: of another shape or dtype than the operand's
            continue
        if ours(aten_name) == before:  # it is ATen's, and not for us to judge
            continue
        served += 1
        assert all(a is b for a, b in zip(got, places, strict=True))
        for a, b in zip(places, wanted[1], strict=True):
            assert_same_metadata(a, b)
            if a._base is not None:  # the gaps as well
                a, b = a._base, b._base
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    if not served and name not in ATENS:
        reasons = whys(aten_name)
        assert all("its result is" in why for why in reasons), reasons


def test_what_in_place_calls_leave_to_aten() -> None:
    """Its errors are ATen's too."""
    a = torch.randn(4, 6, device=DEVICE)
    with gems_compile.use_gems(only=["add_", "mul", "eq_", "neg_"]):
        assert torch.equal(a.clone().add_(a, alpha=2), a + 2 * a)
        b = a.clone()
        b[:2].add_(b[2:])  # the same memory, other elements
        assert torch.equal(b, torch.cat([a[:2] + a[2:], a[2:]]))
        c = a.clone()
        assert torch.equal(c.mul_(c), a * a)
        assert not ours("add_.Tensor") or ours("add_.Tensor") == 1
        with pytest.raises(RuntimeError, match="can't be cast"):
            torch.ones(3, dtype=torch.int64, device=DEVICE).add_(1.5)
        with pytest.raises(RuntimeError, match="single memory location"):
            torch.zeros(1, 3, device=DEVICE).expand(4, 3).add_(1)
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            torch.ones(3, device=DEVICE).add_(torch.ones(2, 3, device=DEVICE))
        small = torch.empty(0, device=DEVICE)
        assert torch.equal(torch.mul(a, a, out=small), a * a)  # which is made larger
        wide = torch.empty(4, 6, dtype=torch.float64, device=DEVICE)
        assert torch.equal(torch.mul(a, a, out=wide), (a * a).double())
        mask = a.clone()
        assert torch.equal(mask.eq_(mask[0, 0].item()), (a == a[0, 0]).float())


def test_gradients_through_in_place_calls() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.randn(4, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return (x * 1).mul_(y).add_(x).sigmoid_().cumsum(0).relu_()

    with gems_compile.use_gems(only=["mul_", "add_", "sigmoid_", "relu_"]):
        assert torch.autograd.gradcheck(fn, (x, y), fast_mode=True)
        z = (x * 1).exp_()
        version = z._version
        z.add_(1)
        assert z._version == version + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
    assert ours("mul_.Tensor") and ours("sigmoid_") and ours("relu_")


def test_lazily_negated_operands() -> None:
    """Their memory holds other numbers."""
    c = torch.randn(4, 5, dtype=torch.complex64, device=DEVICE)
    a = c.conj().imag
    assert a.is_neg()
    with gems_compile.use_gems(only=["neg", "clone", "mul", "copy_"]):
        torch.testing.assert_close(-a, c.imag)
        torch.testing.assert_close(a.clone(), -c.imag)
        torch.testing.assert_close(torch.zeros_like(c.real).copy_(a), -c.imag)
        torch.testing.assert_close(a * a, c.imag**2)


def test_many_can_be_replaced() -> None:
    """On a GPU too, but for what ATen has no kernel of there."""
    target = current_target()
    assert sum(eager.why_not_replaced(n, target) is None for n in eager._overloads()) > 550
