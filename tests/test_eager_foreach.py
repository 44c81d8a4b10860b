"""Lists of tensors behind eager PyTorch: ``_foreach_`` ops, against ATen and in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, assert_same_metadata
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gems_compile
from gems_compile import eager
from gems_compile.calls import lists, varying
from gems_compile.calls.one_call import aten_name
from gems_compile.kernels.target import current_target

SHAPES = [(3, 5), (7,), (), (65, 33), (2, 3, 4)]
FORMS = [n for n, f in eager._forms().items() if str(f.functional) in lists.foreach()]
#: what the numbers of an op's first operand lie between
BETWEEN = {"acos": (-1, 1), "asin": (-1, 1), "lgamma": (1, 4)}
#: floats only, or of which integers of ATen's become floats, that have no place in an integer list
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def drawn(*shapes: Any, low: float = 0.5, high: float = 3.0, dtype: Any = None) -> list[Tensor]:
    return [(torch.rand(s, device=DEVICE) * (high - low) + low).to(dtype) for s in shapes]


def arguments(fn: Any, dtype: torch.dtype) -> list[Any]:
    """A call's positional arguments, each list of tensors drawn."""
    base = fn._schema.name.removeprefix("aten::_foreach_").rstrip("_")
    low, high = BETWEEN.get(base, (0.5, 3.0))
    made: list[Any] = []
    for argument in fn._schema.arguments:
        kind = str(argument.type)
        if kind == "List[Tensor]":
            made.append(drawn(*SHAPES, low=low, high=high, dtype=dtype))
        elif kind == "Tensor":
            made += drawn((), dtype=dtype)
        elif not argument.has_default_value():
            made.append(1.75)
    return made


def copied(args: Any) -> Any:
    """The same on memory of its own, with its gaps; what is expanded is not written."""

    def copy(t: Any) -> Any:
        if not torch.is_tensor(t) or 0 in t.stride():
            return t
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)

    return tree_map(copy, args)


def in_float64(args: Any) -> Any:
    return tree_map(lambda t: t.double().clone() if torch.is_tensor(t) else t, args)


def check(fn: Any, args: list[Any], exactly: bool = False, **kwargs: Any) -> None:
    """Served, with ATen's results: returned or written, as accurate, in the same layout."""
    own, wide = copied(args), in_float64(args)
    before = ours(aten_name(fn))
    with gems_compile.use_gems(only=[str(fn)]):
        got = fn(*own, **kwargs)
    assert ours(aten_name(fn)) == before + 1, whys(aten_name(fn))
    want, exact = fn(*args, **kwargs), fn(*wide, **kwargs)
    assert (got is None) == (want is None)
    if want is None:
        got, want, exact = own[0], args[0], wide[0]
    assert type(got) is list and len(got) == len(want)
    for k, (a, b, c) in enumerate(zip(got, want, exact, strict=True)):
        assert_same_metadata(a, b, f"result {k}")
        if exactly:
            assert torch.equal(a, b)
        else:
            assert_accurate(a, b, c, f"{fn}, result {k}", "tensor", least=4.0)


# each op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*lists.foreach(), *FORMS])
def test_every_op(name: str) -> None:
    assert eager.why_not_replaced(name, current_target()) is None
    fn = eager._overloads()[name]
    for dtype in DTYPES:
        check(fn, arguments(fn, dtype))


def test_what_is_served() -> None:
    """Every overload but those that compare, or scale by, lists of numbers."""
    named = "add sub mul div addcmul addcdiv neg abs sqrt exp reciprocal maximum minimum clamp_min"
    for base in (*named.split(), "clamp_max", "lerp", "pow", "sign", "zero"):
        packets = [getattr(torch.ops.aten, f"_foreach_{base}{end}") for end in ("", "_")]
        found = {aten_name(getattr(p, which)) for p in packets for which in p.overloads()}
        left = {n for n in found if "out" in n or n.endswith(".ScalarList")}
        left |= {n for n in found if base in ("addcmul", "addcdiv") and n.endswith(".Tensor")}
        assert found - left <= {aten_name(fn) for fn in eager._overloads().values()}
    assert "aten._foreach_norm.Scalar" in lists.foreach()
    assert not any("ScalarList" in n or "copy" in n or "clone" in n for n in lists.foreach())


@pytest.mark.parametrize("order", [0, 1, 2, 3, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(order: float, dtype: torch.dtype) -> None:
    grads = drawn(*SHAPES, (2000,), low=-3.0, dtype=dtype)
    check(torch.ops.aten._foreach_norm.Scalar, [grads, order])


def test_a_norm_in_another_dtype() -> None:
    fn, x = torch.ops.aten._foreach_norm.Scalar, drawn(*SHAPES, dtype=torch.bfloat16)
    with gems_compile.use_gems(only=[str(fn)]):
        got = fn(x, 2, torch.float32)
    assert ours(aten_name(fn)) and {t.dtype for t in got} == {torch.float32}
    torch.testing.assert_close(got, [t.double().norm().float() for t in x])


def test_alpha_and_value() -> None:
    for which in ("List", "Tensor"):
        fn = getattr(torch.ops.aten._foreach_add_, which)
        check(fn, arguments(fn, torch.float32), alpha=-0.5)
    fn = torch.ops.aten._foreach_addcdiv_.Scalar
    check(fn, [*arguments(fn, torch.bfloat16), -0.125])


# lists that are not alike ------------------------------------------------------------------------


def test_several_dtypes() -> None:
    aten, shapes = torch.ops.aten, [(3,), (4, 2), (5,)]
    floats = [t.to(d) for t, d in zip(drawn(*shapes), DTYPES, strict=True)]
    check(aten._foreach_add.Scalar, [floats, 1.5])
    check(aten._foreach_mul_.List, [floats, drawn(*shapes)])  # whose places are narrower, or wider
    ints = [torch.arange(9, device=DEVICE), torch.arange(4, dtype=torch.int32, device=DEVICE)]
    check(aten._foreach_add_.Scalar, [ints, 3], exactly=True)
    check(aten._foreach_div.Scalar, [ints, 4])
    with gems_compile.use_gems(only=["_foreach_div_"]), pytest.raises(RuntimeError, match="cast"):
        torch._foreach_div_(ints, 4)


def test_layouts() -> None:
    """With gaps, transposed and expanded; each place keeps its own."""
    x = torch.randn(6, 8, device=DEVICE)
    places = [x.clone().t(), x.clone()[:, ::2], x.clone()[None]]
    others = [torch.randn(8, 6, device=DEVICE), x[0, :4].expand(6, 4), x]
    check(torch.ops.aten._foreach_add_.List, [places, others])
    check(torch.ops.aten._foreach_mul.List, [places, others])


def test_empty_tensors() -> None:
    aten, shapes = torch.ops.aten, [(3,), (0,), (4,), (2, 0)]
    check(aten._foreach_add.List, [drawn(*shapes), drawn(*shapes)])
    check(aten._foreach_add_.List, [drawn(*shapes), drawn(*shapes)])
    check(aten._foreach_exp_.default, [drawn(*shapes)])


def test_empty_lists_are_atens() -> None:
    with gems_compile.use_gems(only=["_foreach_add", "_foreach_add_"]):
        for fn in (torch._foreach_add, torch._foreach_add_):
            with pytest.raises(RuntimeError, match="at least one"):
                fn([], 1.0)
        with pytest.raises(RuntimeError, match="same"):  # its error, of lists that do not fit
            torch._foreach_add_(drawn((3,), (4,)), drawn((3,)))
        with pytest.raises(RuntimeError, match="size"):
            torch._foreach_add(drawn((3,)), drawn((4,)))
    assert not ours("_foreach_add.List") and not ours("_foreach_add_.List")


# shared memory -----------------------------------------------------------------------------------


def test_what_is_read_twice() -> None:
    """As Adam squares gradients. A later call of two lists is no call of one list twice."""
    fn, places, grads = (
        torch.ops.aten._foreach_addcmul_.Scalar,
        drawn((9,), (4,)),
        drawn((9,), (4,)),
    )
    with gems_compile.use_gems(only=[str(fn)]):
        for others in (grads, drawn((9,), (4,))):
            got = copied(places)
            fn(got, grads, others, 0.5)
            for a, p, g, o in zip(got, places, grads, others, strict=True):
                torch.testing.assert_close(a, p + 0.5 * g * o)
    assert eager.stats()[aten_name(fn)] == {"ours": 2, "native": 0, "compiled": 1}


@pytest.mark.parametrize("how", ["itself", "another place", "twice", "views"])
def test_what_is_written_and_read_is_atens(how: str) -> None:
    def lists_of() -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(3)
        a, b = drawn((4,), (4,))
        return {
            "itself": ([a, b], [a, b]),
            "another place": ([a, b], [b, a]),  # one after the other
            "twice": ([a, a], drawn((4,), (4,))),
            "views": ([a[:2], b], [a[2:], b.clone()]),
        }[how]

    fn = torch.ops.aten._foreach_add_.List
    want, got = lists_of(), lists_of()
    fn(*want)
    with gems_compile.use_gems(only=[str(fn)]):
        fn(*got)
    assert not ours(aten_name(fn))
    for a, b in zip(got[0], want[0], strict=True):
        assert torch.equal(a, b)


# numbers, launches, gradients --------------------------------------------------------------------


def test_numbers_that_never_repeat() -> None:
    """Some are compiled; further ones are ATen's, those that were met stay ours."""
    fn, x = torch.ops.aten._foreach_mul_.Scalar, drawn((5,), (6,))
    with gems_compile.use_gems(only=[str(fn)]):
        for step in range(varying.MAX_NUMBERS + 4):
            fn(x, 1 + step / 64)
        assert eager.stats()[aten_name(fn)]["compiled"] == varying.MAX_NUMBERS
        before = ours(aten_name(fn))
        fn(x, 1.0)
        assert ours(aten_name(fn)) == before + 1
        fn(drawn((7,)), 99.0)  # another list has numbers of its own
        assert ours(aten_name(fn)) == before + 2
    assert any("another each time" in why for why in whys(aten_name(fn)))


def test_few_launches_for_many_tensors(monkeypatch: Any) -> None:
    from gems_compile.lowering import pipeline

    reports, whole = [], pipeline.compile_graph

    def watched(*args: Any) -> Any:
        run, report = whole(*args)
        reports.append(report)
        return run, report

    monkeypatch.setattr(pipeline, "compile_graph", watched)
    tensors = drawn(*[(64, 32), (64,), (33, 64), (7,), (128, 128)] * 8)
    check(torch.ops.aten._foreach_mul_.Scalar, [tensors, 2.5])
    check(torch.ops.aten._foreach_sqrt.default, [tensors])
    assert [r.launches <= 2 for r in reports] == [True, True]


def test_gradients() -> None:
    leaves = [t.requires_grad_() for t in drawn((3, 4), (5,), dtype=torch.float64)]

    def fn(*x: Tensor) -> tuple[Tensor, ...]:
        out = torch._foreach_mul(torch._foreach_exp(x), x)
        torch._foreach_sqrt_(out)
        return (*out, *torch._foreach_norm(x))

    with gems_compile.use_gems(only=["_foreach_mul", "_foreach_exp", "_foreach_sqrt_"]):
        assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)
        x = [t * 1 for t in leaves]
        versions = [t._version for t in x]
        y = torch._foreach_exp(x)
        torch._foreach_sqrt_(y)
        assert [t._version for t in x] == versions
        torch._foreach_sqrt_(x)
        assert [t._version for t in x] == [v + 1 for v in versions]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y[0].sum().backward()
    assert ours("_foreach_mul.List") and ours("_foreach_exp") and ours("_foreach_sqrt_")


# a training --------------------------------------------------------------------------------------


def trained(net: nn.Module, make: Any, steps: int = 4) -> list[Tensor]:
    net = copy.deepcopy(net)
    x, y = torch.linspace(-2, 2, 96).view(16, 6).to(DEVICE), torch.ones(16, 5, device=DEVICE)
    optimizer = make(net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5, foreach=True)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True, maximize=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, foreach=True),
    ],
    ids=["AdamW", "amsgrad", "SGD", "RMSprop"],
)
def test_a_training(make: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Linear(33, 5)).to(DEVICE)
    want = trained(net, make)
    gems_compile.enable(all=True)
    got = trained(net, make)
    gems_compile.disable()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    served = {n for n, row in eager.stats().items() if row["ours"] and n.startswith("_foreach_")}
    assert {"_foreach_norm.Scalar", "_foreach_mul_.Tensor"} <= served
    assert len(served) >= 4, served
