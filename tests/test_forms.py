"""In-place and out= overloads, and those that declared ops make up, behind eager PyTorch: on our
samples and on torch's own, against ATen."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from composed_calls import CALLS
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, assert_same_metadata, ints
from opcheck import SEED, calls, make, overload, tensors
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import gems_compile
from gems_compile import eager
from gems_compile.calls import forms, one_call
from gems_compile.calls.lists import foreach
from gems_compile.calls.optimizers import optimizers
from gems_compile.calls.ordering import ORDERING
from gems_compile.kernels.composed import COMPOSED
from gems_compile.kernels.draws import DRAWS
from gems_compile.kernels.factories import FACTORIES
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import current_target

Sample = tuple[tuple[Any, ...], dict[str, Any]]
aten = torch.ops.aten
LARGEST = 5000  # elements of a sample: the interpreter is slow

#: torch's ops whose samples come to them
TORCHS = {
    "_chunk_cat",
    "_native_batch_norm_legit",
    "_unsafe_masked_index",
    "_upsample_bilinear2d_aa",
    "addmv",
    "addr",
    "alias_copy",
    "allclose",
    "aminmax",
    "angle",
    "as_strided_copy",
    "block_diag",
    "bucketize",
    "cat",
    "cdist",
    "constant_pad_nd",
    "count_nonzero",
    "cumsum",
    "diag",
    "diag_embed",
    "diagonal",
    "diagonal_copy",
    "diagonal_scatter",
    "dist",
    "dot",
    "equal",
    "expand_copy",
    "flip",
    "gather",
    "index_add",
    "index_copy",
    "index_fill",
    "index_reduce",
    "isin",
    "kthvalue",
    "linalg.cross",
    "linalg.vecdot",
    "linalg.vector_norm",
    "logsumexp",
    "max_pool2d_with_indices_backward",
    "median",
    "mv",
    "mvlgamma",
    "nanmean",
    "nanmedian",
    "nansum",
    "narrow_copy",
    "native_batch_norm",
    "nn.functional.adaptive_avg_pool1d",
    "nn.functional.adaptive_avg_pool2d",
    "nn.functional.adaptive_avg_pool3d",
    "nn.functional.adaptive_max_pool2d",
    "nn.functional.avg_pool2d",
    "nn.functional.avg_pool3d",
    "nn.functional.batch_norm",
    "nn.functional.binary_cross_entropy",
    "nn.functional.binary_cross_entropy_with_logits",
    "nn.functional.channel_shuffle",
    "nn.functional.cross_entropy",
    "nn.functional.embedding",
    "nn.functional.fold",
    "nn.functional.glu",
    "nn.functional.grid_sample",
    "nn.functional.huber_loss",
    "nn.functional.interpolate",
    "nn.functional.logsigmoid",
    "nn.functional.max_pool2d",
    "nn.functional.max_pool3d",
    "nn.functional.mse_loss",
    "nn.functional.nll_loss",
    "nn.functional.pad",
    "nn.functional.pairwise_distance",
    "nn.functional.pixel_shuffle",
    "nn.functional.pixel_unshuffle",
    "nn.functional.prelu",
    "nn.functional.smooth_l1_loss",
    "nn.functional.soft_margin_loss",
    "nn.functional.upsample_bilinear",
    "norm",
    "permute_copy",
    "polar",
    "renorm",
    "repeat",
    "roll",
    "rot90",
    "scatter_reduce",
    "searchsorted",
    "select",
    "select_scatter",
    "slice",
    "sort",
    "squeeze_copy",
    "stack",
    "t_copy",
    "take",
    "topk",
    "torch.ops.aten._safe_softmax.default",
    "trace",
    "tril",
    "triu",
    "unfold",
    "unfold_copy",
    "vdot",
    "view_copy",
}
#: calls of what those do not come to
BY_HAND: dict[str, Any] = {
    "aten.reflection_pad2d.default": lambda r: (r(2, 3, 4, 5), [1, 2, 2, 1]),
    "aten.reflection_pad2d_backward.default": lambda r: (
        r(2, 3, 7, 8),
        r(2, 3, 4, 5),
        [1, 2, 2, 1],
    ),
    "aten.reflection_pad3d.default": lambda r: (r(2, 3, 4, 5, 6), [1, 1, 2, 2, 1, 0]),
    "aten.reflection_pad3d_backward.default": lambda r: (
        r(2, 3, 5, 9, 8),
        r(2, 3, 4, 5, 6),
        [1, 1, 2, 2, 1, 0],
    ),
    "aten.replication_pad3d.default": lambda r: (r(2, 3, 4, 5, 6), [1, 1, 2, 2, 1, 0]),
    "aten.isin.Scalar_Tensor": lambda r: (2, torch.arange(5, device=DEVICE)),
    "aten.isin.Tensor_Scalar": lambda r: (torch.arange(5, device=DEVICE), 2),
    "aten.norm.Scalar": lambda r: (r(4, 5),),
    "aten.im2col.default": lambda r: (r(2, 3, 8, 8), [3, 3], [1, 1], [1, 1], [2, 2]),
    "aten.sort.stable": lambda r: (r(5, 33),),
    "aten.slice_scatter.default": lambda r: (r(8, 4), r(3, 4), 0, 1, 7, 2),
    "aten._weight_norm_interface.default": lambda r: (r(4, 5), r(4, 1), 0),
    "aten.mm.default": lambda r: (r(1, 33), r(17, 33).t()),
    "aten.bmm.default": lambda r: (r(3, 17, 33), r(3, 33, 1)),
    "aten.addmm.default": lambda r: (r(17), r(1, 33), r(17, 33).t()),
    "aten.baddbmm.default": lambda r: (r(3, 1, 17), r(3, 1, 33), r(3, 17, 33).mT),
    "aten.addbmm.default": lambda r: (r(5, 6), r(3, 5, 1), r(3, 1, 6)),
    "aten._adaptive_avg_pool2d_backward.default": lambda r: (r(2, 3, 2, 5), r(2, 3, 6, 5)),
    "aten._adaptive_avg_pool3d_backward.default": lambda r: (r(2, 3, 2, 1, 2), r(2, 3, 4, 3, 4)),
    "aten._batch_norm_no_update.default": lambda r: (r(4, 3, 5), *norm_of(r, 3), 0.1, 1e-5),
    "aten._batch_norm_with_update.default": lambda r: (r(4, 3, 5), *norm_of(r, 3), 0.1, 1e-5),
    "aten._batch_norm_with_update_functional.default": lambda r: (
        r(4, 3, 5),
        *norm_of(r, 3),
        0.1,
        1e-5,
    ),
    "aten._is_all_true.default": lambda r: (r(4, 5) > -9,),
    "aten._masked_scale.default": lambda r: (r(4, 5), (r(4, 5) > 0).byte(), 1.25),
    "aten._unsafe_masked_index_put_accumulate.default": lambda r: (
        r(9),
        r(5) > 0,
        [torch.arange(5, device=DEVICE)],
        r(5),
    ),
    "aten._upsample_bicubic2d_aa.default": lambda r: (r(2, 3, 9, 7), [4, 12], False),
    "aten._upsample_nearest_exact1d.default": lambda r: (r(2, 3, 7), [12], None),
    "aten._upsample_nearest_exact2d.default": lambda r: (r(2, 3, 7, 9), [12, 4], None, None),
    "aten._upsample_nearest_exact3d.default": lambda r: (r(2, 3, 4, 5, 3), [6, 2, 9]),
    "aten._weight_norm_interface_backward.default": lambda r: (
        *(r(4, 5), r(4, 5), r(4, 1)),
        r(4, 1).abs() + 1,
        0,
    ),
    "aten.lift_fresh_copy.default": lambda r: (r(4, 5),),
    "aten.replication_pad1d_backward.default": lambda r: (r(2, 3, 9), r(2, 3, 6), [1, 2]),
    "aten.replication_pad2d_backward.default": lambda r: (
        r(2, 3, 9, 1),
        r(2, 3, 6, 1),
        [0, 0, 1, 2],
    ),
    "aten.replication_pad3d_backward.default": lambda r: (
        r(2, 3, 4, 9, 8),
        r(2, 3, 4, 6, 5),
        [2, 1, 1, 2, 0, 0],
    ),
    "aten.scatter.reduce": lambda r: (r(4, 5), 0, ints(2, 5, high=4), r(2, 5)),
    "aten.scatter.value_reduce": lambda r: (r(4, 5), 1, ints(4, 3, high=5), 2.0),
    "aten.bucketize.Scalar": lambda r: (0.25, r(9).sort()[0]),
    "aten.searchsorted.Scalar": lambda r: (r(9).sort()[0], 0.25),
    "aten.searchsorted.Tensor": lambda r: (r(3, 9).sort()[0], r(3, 5)),
    "aten.col2im.default": lambda r: (r(2, 12, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten._native_batch_norm_legit.no_stats": lambda r: (
        *(r(4, 3, 5), r(3), r(3)),
        *(True, 0.1, 1e-5),
    ),
    "aten.affine_grid_generator.default": lambda r: (r(2, 2, 3), [2, 3, 4, 5], False),
    **CALLS,
}
#: and what they are given by name
KEYWORDS = {
    "aten.sort.stable": {"stable": True},
    "aten.scatter.reduce": {"reduce": "add"},
    "aten.scatter.value_reduce": {"reduce": "add"},
}


def norm_of(r: Any, channels: int) -> tuple[Tensor, ...]:
    """A batch norm's weight, bias, and running mean and variance."""
    return r(channels), r(channels), r(channels), r(channels).abs()


class Captured(TorchDispatchMode):
    """Notes the calls of composed overloads, with copies of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted = {overload(name): name for name in COMPOSED if name not in BY_HAND}
        self.found: dict[str, list[Sample]] = defaultdict(list)

    def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, self.wanted.get(fn)
        given = tensors((args, kwargs))
        if name and len(self.found[name]) < 12 and sum(t.numel() for t in given) < LARGEST:
            copied = tree_map(lambda a: a.detach().clone() if torch.is_tensor(a) else a, args)
            self.found[name].append((copied, dict(kwargs)))
        return fn(*args, **kwargs)


@functools.cache
def torchs_samples() -> dict[str, list[Sample]]:
    """Of each composed overload, what torch's samples of all ops, forward and backward, call."""
    capture = Captured()
    torch.manual_seed(0)
    for info in op_db:
        if info.name not in TORCHS:
            continue
        for dtype in {torch.float32, torch.int64} & set(info.supported_dtypes("cpu")):
            grad = dtype == torch.float32 and info.supports_autograd
            # all of them: some generators hold torch's settings until their end
            for sample in list(info.sample_inputs(DEVICE, dtype, requires_grad=grad))[:6]:
                try:
                    with capture:
                        out = info.op(sample.input, *sample.args, **sample.kwargs)
                        used = [t for t in tensors(out) if t.requires_grad]
                        if used:
                            torch.autograd.backward(used, [torch.ones_like(t) for t in used])
                except (RuntimeError, TypeError, ValueError):
                    continue  # it is no business of ours what torch refuses
    return capture.found


def samples(name: str) -> list[Sample]:
    """Calls of a functional overload, in another order for another seed: a test takes the first,
    and further ones until a kernel serves one."""
    if name in BY_HAND:
        drawn = lambda *shape: torch.randn(shape, device=DEVICE)  # noqa: E731
        return [(BY_HAND[name](drawn), KEYWORDS.get(name, {}))]
    if name in OPS:
        dtype = "float32" if "float32" in OPS[name].dtypes else OPS[name].dtypes[0]
        found = [make(call, dtype) for call in calls(name)]
    else:
        found = torchs_samples()[name]
    found = [s for s in found if all(t.numel() for t in tensors(s))] or found
    return random.Random(f"{name} {SEED}").sample(found, len(found))


@pytest.fixture(autouse=True)
def any_order() -> None:
    """Sums may be atomic: where deterministic algorithms are asked for, scatters are ATen's."""
    torch.use_deterministic_algorithms(False)


def copied(sample: Sample) -> Sample:
    """The same call on memory of its own."""
    return tree_map(lambda a: a.clone() if torch.is_tensor(a) else a, sample)


def in_dtype(sample: Sample, dtype: torch.dtype) -> Sample:
    floats = lambda a: torch.is_tensor(a) and a.is_floating_point()  # noqa: E731
    return tree_map(lambda a: a.to(dtype) if floats(a) else a, sample)


def exactly(fn: Any, sample: Sample, results: list[Tensor]) -> list[Tensor]:
    """The results and the operands after the call in float64, or what there is where ATen does not
    know of it."""
    wide = in_dtype(sample, torch.float64)
    try:
        return tensors((fn(*wide[0], **wide[1]), wide))
    except (RuntimeError, TypeError):
        return [t.double() if t.is_floating_point() else t for t in results]


# what declared ones make up ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COMPOSED)
def test_composed(name: str, dtype: torch.dtype) -> None:
    if why := eager.why_not_replaced(name, current_target()):
        pytest.skip(why)
    fn, served, taken = overload(name), 0, 0
    if fn in ORDERING and dtype == torch.bfloat16:
        pytest.skip("elements that are equal stand in any order: see test_sorting.py")
    for k, sample in enumerate(samples(name)):
        if k >= 4 and served:
            break
        sample = in_dtype(sample, dtype)
        own, wide = copied(sample), copied(sample)
        try:
            want = fn(*sample[0], **sample[1])
        except (RuntimeError, TypeError):  # not in this dtype
            continue
        taken += 1
        before = ours(one_call.aten_name(fn))
        with gems_compile.use_gems(only=[name]):
            got = fn(*own[0], **own[1])
        if isinstance(want, bool):
            assert got is want
        served += ours(one_call.aten_name(fn)) > before
        got, want = tensors((got, own)), tensors((want, sample))  # with what was written
        assert len(got) == len(want)
        exact = exactly(fn, wide, want)
        # 4 ulps of the largest: eager is lucky with few sums of few terms
        for i, (a, b, c) in enumerate(zip(got, want, exact, strict=True)):
            assert_same_metadata(a, b, f"result {i}")
            assert_accurate(a, b, c, f"{name}, result {i}", "tensor", least=4.0)
    if not taken and DEVICE == "cuda":
        pytest.skip("ATen refuses all samples there")
    if dtype == torch.float32:
        assert served, whys(one_call.aten_name(fn))


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


def _derived() -> list[str]:
    """Of factories, random ops, lists of tensors and optimizers others have the tests."""
    own = {*FACTORIES, *DRAWS, *foreach(), *(str(f.functional) for f in optimizers())}
    return [name for name, form in eager._forms().items() if str(form.functional) not in own]


@pytest.mark.parametrize("name", _derived())
def test_writes(name: str) -> None:
    """The functional overload's results where they belong, and nothing else; what is returned is
    what was given."""
    if why := eager.why_not_replaced(name, current_target()):
        pytest.skip(why)
    form, served, refused = eager._forms()[name], 0, 0
    aten_name = one_call.aten_name(form.overload)
    for k, sample in enumerate(samples(str(form.functional))):
        if k >= 3 and served:
            break
        try:
            results = tensors(form.functional(*sample[0], **sample[1]))
        except RuntimeError:  # ATen's: of integers on a GPU, say
            refused += 1
            continue
        made, wanted = (places_of(form, sample, bool(k % 2)) for _ in range(2))
        if made is None or wanted is None:
            continue
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
    if refused and not served and DEVICE == "cuda":
        pytest.skip("ATen refuses samples there")
    if not served:
        reasons = whys(aten_name)
        assert all("its result is" in why or "is empty" in why for why in reasons), reasons


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
