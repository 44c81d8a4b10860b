"""Random ops behind eager PyTorch: whose numbers, of which distribution, from which generator."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eagercheck import nothing_left, ours, replaceable, whys  # noqa: F401
from helpers import DEVICE, assert_same, assert_same_metadata, compile_
from opcheck import check_call, instantiate, overload, tensors
from torch import Tensor

import gems_compile
from gems_compile import eager
from gems_compile.calls import forms
from gems_compile.kernels.draws import DIGITS, DRAWS, Bits
from gems_compile.kernels.op import OPS

on = {"device": DEVICE}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RANDOM = [*DRAWS, *(n for n, f in eager._forms().items() if str(f.functional) in DRAWS)]
SERVED = [n for n in RANDOM if n in replaceable()]

empty = lambda *shape, **o: torch.empty(*shape, **on, **o)  # noqa: E731
probabilities = lambda dtype: torch.linspace(0, 1, 6, dtype=dtype, **on).expand(4, 6)  # noqa: E731

#: overload -> a call of it in a dtype
CALLS: dict[str, Callable[[torch.dtype], Any]] = {
    "rand": lambda d: torch.rand(3, 7, dtype=d, **on),
    "rand_like": lambda d: torch.rand_like(empty(5, 4, dtype=d).t()),
    "randn": lambda d: torch.randn(3, 7, dtype=d, **on),
    "randn_like": lambda d: torch.randn_like(empty(2, 3, 4, dtype=d).permute(1, 2, 0)),
    "randint": lambda d: torch.randint(7, (3, 5), dtype=d, **on),
    "randint.low": lambda d: torch.randint(-9, 9, (3, 5), dtype=d, **on),
    "randint_like": lambda d: torch.randint_like(empty(9, dtype=d), 5),
    "randint_like.low_dtype": lambda d: torch.randint_like(empty(9, dtype=d), -3, 5),
    "uniform_": lambda d: empty(5, 6, dtype=d)[:, ::2].uniform_(-1.5, 2.25),
    "normal_": lambda d: empty(4, 5, dtype=d).t().normal_(3.0, 0.5),
    "exponential_": lambda d: empty(17, dtype=d).exponential_(1.5),
    "cauchy_": lambda d: empty(17, dtype=d).cauchy_(1.0, 0.5),
    "log_normal_": lambda d: empty(17, dtype=d).log_normal_(0.5, 0.75),
    "bernoulli_.float": lambda d: empty(17, dtype=d).bernoulli_(0.3),
    "bernoulli_.Tensor": lambda d: empty(4, 6, dtype=d).bernoulli_(probabilities(torch.float32)),
    "bernoulli": lambda d: torch.bernoulli(probabilities(d)),
    "normal.float_float": lambda d: torch.normal(1.0, 2.0, (3, 5), dtype=d, **on),
    "normal.Tensor_float": lambda d: torch.normal(probabilities(d), 2.0),
    "normal.float_Tensor": lambda d: torch.normal(1.0, probabilities(d)),
    "normal.Tensor_Tensor": lambda d: torch.normal(probabilities(d), probabilities(d)[:1] + 0.5),
    "native_dropout": lambda d: torch.native_dropout(torch.ones(4, 9, dtype=d, **on), 0.4, True),
    "randperm": lambda d: torch.randperm(40, dtype=d, **on),
    "randperm.out": lambda d: torch.randperm(40, out=empty(40, dtype=d)),
    "rand.out": lambda d: torch.rand(3, 4, out=empty(3, 4, dtype=d)),
    "randint.out": lambda d: torch.randint(9, (3, 4), out=empty(3, 4, dtype=d)),
}


def drawn(fn: Callable[..., Any], *args: Any, seed: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    with gems_compile.use_gems(only=SERVED):
        return tensors(fn(*args))


def rule(fn: Callable[..., Any], *args: Any, seed: int = 5) -> list[Tensor]:
    """The same numbers by ATen's own ops, as the rules write them."""
    torch.manual_seed(seed)
    with Rules():
        return tensors(fn(*args))


class Rules(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(fn), dict(kwargs or {})
        form = eager._forms().get(name)
        if form is None:
            return DRAWS[name](*args, **kwargs) if name in DRAWS else fn(*args, **kwargs)
        if str(form.functional) not in DRAWS:
            return fn(*args, **kwargs)
        given, names = forms.functional_call(form, args, kwargs)
        (place,) = forms.places(form, args, kwargs)
        return place.copy_(DRAWS[str(form.functional)](*given, **names))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_those_of_the_rule(name: str, dtype: torch.dtype) -> None:
    """Layout is ATen's; the seed decides the numbers, and another call's are others."""
    call = CALLS[name]
    if dtype == torch.bfloat16 and name.startswith("randperm") and DEVICE == "cuda":
        pytest.skip("ATen draws no permutation in bfloat16 there")
    first, again = drawn(call, dtype), drawn(call, dtype)
    assert ours(name) == 2, whys(name)
    for a, b, native in zip(first, again, tensors(call(dtype)), strict=True):
        assert_same_metadata(a, native)
        assert_same(a, b, exact=True)
    if name != "native_dropout":  # whose rule shares its seed with other dropouts
        steps = 8 * torch.finfo(dtype).eps  # of log, cos and tan; all else is exact
        (want,) = rule(call, dtype)
        assert_same(first[0].contiguous(), want.contiguous(), rtol=steps, atol=steps)
    assert any(
        not torch.equal(a, b) for a, b in zip(first, drawn(call, dtype, seed=6), strict=True)
    )


def test_every_random_op_is_met() -> None:
    told = {str(f.functional) for f in eager._forms().values() if f.overload.name()[6:] in CALLS}
    met = told | {f"aten.{name}" for name in CALLS} | {f"aten.{name}.default" for name in CALLS}
    generators = {n for n in DRAWS if "generator" in n}
    assert DRAWS.keys() - met == generators


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
def test_whole_numbers_of_every_width(dtype: torch.dtype) -> None:
    low, high = (0, 2) if dtype == torch.bool else (3, 120)
    (got,) = drawn(lambda: torch.randint(low, high, (4000,), dtype=dtype, **on))
    assert got.dtype == dtype and ours("randint.low") == 1, whys("randint.low")
    counts = torch.bincount(got.long().cpu() - low, minlength=high - low).double()
    expected = len(got) / (high - low)
    assert len(counts) == high - low
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < high - low + 6 * math.sqrt(2 * (high - low))
    (flags,) = drawn(lambda: empty(4000, dtype=dtype).bernoulli_(0.3))
    assert flags.dtype == dtype and abs(flags.float().mean() - 0.3) < 0.04


# distributions -----------------------------------------------------------------------------------

N = 20000
normal_cdf = lambda z: 0.5 * (1 + torch.erf(z / math.sqrt(2)))  # noqa: E731
#: what is drawn in a dtype, and its cumulative distribution
DISTRIBUTIONS: dict[str, tuple[Callable[[torch.dtype], Tensor], Callable[[Tensor], Tensor]]] = {
    "uniform": (lambda d: empty(N, dtype=d).uniform_(-2, 3), lambda x: (x + 2) / 5),
    "rand": (lambda d: torch.rand(N, dtype=d, **on), lambda x: x),
    "normal": (lambda d: empty(N, dtype=d).normal_(1, 2), lambda x: normal_cdf((x - 1) / 2)),
    "randn": (lambda d: torch.randn(N, dtype=d, **on), normal_cdf),
    "exponential": (lambda d: empty(N, dtype=d).exponential_(2), lambda x: 1 - torch.exp(-2 * x)),
    "cauchy": (
        lambda d: empty(N, dtype=d).cauchy_(1, 2),
        lambda x: 0.5 + torch.atan((x - 1) / 2) / math.pi,
    ),
    "log normal": (
        lambda d: empty(N, dtype=d).log_normal_(0.5, 1),
        lambda x: normal_cdf(x.log() - 0.5),
    ),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(name: str, dtype: torch.dtype) -> None:
    """Kolmogorov and Smirnov's distance, which one seed in ten thousand would exceed; a number
    stands for all that round to it. Neighbours know nothing of each other."""
    call, cdf = DISTRIBUTIONS[name]
    (got,) = drawn(call, dtype, seed=11)
    largest = torch.finfo(dtype).max  # few of Cauchy's are infinite in float16, as ATen's
    x = got.cpu().double().clamp(-largest, largest).sort().values
    at, steps = cdf(x), torch.arange(N + 1, dtype=torch.float64) / N
    # within half a step of the dtype, or a whole one where numbers round down
    eps = torch.finfo(dtype).eps
    near = torch.maximum(cdf(x + eps * x.abs()) - at, at - cdf(x - eps * x.abs())).max()
    if name in ("rand", "uniform"):
        near = 2.0 ** -(DIGITS[str(dtype)[6:]]) + near
    distance = torch.maximum((at - steps[:-1]).abs(), (at - steps[1:]).abs()).max()
    assert distance < 2.2 / math.sqrt(N) + near
    ranks = cdf(got.cpu().double()) - 0.5
    for lag in (1, 2, 4, 64):
        correlation = (ranks[:-lag] * ranks[lag:]).mean() * 12
        assert abs(correlation) < 4.5 / math.sqrt(N)


@pytest.mark.parametrize("dtype", FLOATS[1:3], ids=str)
def test_moments(dtype: torch.dtype) -> None:
    (z,) = drawn(lambda: torch.randn(N, dtype=dtype, **on), seed=3)
    z = z.double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        tolerance = 4.5 * math.sqrt(variance / N) + power * torch.finfo(dtype).eps
        assert abs((z**power).mean() - moment) < tolerance
    for p in (0.0, 1e-9, 0.25, 0.5, 0.999, 1.0):
        (flags,) = drawn(lambda p=p: empty(N, dtype=dtype).bernoulli_(p), seed=4)
        mean = flags.double().mean()
        assert abs(mean - p) <= 4.5 * math.sqrt(p * (1 - p) / N) + 1e-9
        assert p not in (0.0, 1.0) or mean == p


@pytest.mark.parametrize("word", ["zeros", "ones", "fours"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_ends_of_a_range(dtype: torch.dtype, word: str, monkeypatch: Any) -> None:
    """The rules on words of nothing but zeros, or ones: where the least and the largest are."""

    def draw(self: Bits, bits: int) -> Tensor:
        number = {"zeros": 0, "ones": 2**bits - 1, "fours": 2 ** (bits - 1)}[word]
        return torch.full(self.size, number, dtype=torch.int32, **on)

    monkeypatch.setattr(Bits, "draw", draw)
    x, digits = empty(3, dtype=dtype), DIGITS[str(dtype)[6:]]
    functional = lambda name, *args: DRAWS[f"aten.{name}.default"](*args).double()  # noqa: E731
    with torch.no_grad():
        u = functional("uniform", x)
        assert u.min() >= 0 and u.max() <= 1 - 2.0**-digits
        for low, high in ((1.0, 1.5), (-3.0, -2.999), (0.1, 0.7), (2.0, 2.0), (0.0, 6e4)):
            u = functional("uniform", x, low, high)
            at = torch.tensor([low, high], dtype=dtype).double()
            assert u.min() >= at[0] and (u.max() < at[1] or at[0] == at[1])
        e = functional("exponential", x)
        assert e.min() > 0 and e.max() < 40
        assert functional("cauchy", x).isfinite().all() or dtype == torch.float16
        z = functional("normal_functional", x)
        assert z.abs().max() < 9 and functional("log_normal", x, 0.0, 1.0).min() > 0
        assert functional("randint", 5, [3]).max() < 5
        assert DRAWS["aten.bernoulli.p"](x, 0.0).max() == 0
        assert DRAWS["aten.bernoulli.p"](x, 1.0).min() == 1
        assert DRAWS["aten.bernoulli.default"](torch.ones_like(x)).min() == 1
        assert DRAWS["aten.bernoulli.default"](torch.zeros_like(x)).max() == 0


@pytest.mark.parametrize("bits", [1, 11, 31])
@pytest.mark.parametrize("shape", [(7, 33), (1, 3, 5), (4, 8), ()])
def test_bits_are_the_upper_ones_of_dropouts_words(shape: tuple[int, ...], bits: int) -> None:
    (sample,) = OPS["gems.random_bits.default"].samples
    args, _ = instantiate(sample, "int32")
    stride = torch.empty(shape).stride()
    report = check_call(overload("gems.random_bits.default"), (args[0], shape, stride, 9, bits), {})
    assert report.launches == 1
    words = torch.ops.gems.random_bits(args[0], shape, stride, 9, 31)
    assert torch.equal(
        torch.ops.gems.random_bits(args[0], shape, stride, 9, bits), words >> (31 - bits)
    )
    mask = torch.ops.gems.dropout_mask(args[0], shape, 0.25, 9)
    assert torch.equal(mask, words >= 2**29)


# generators --------------------------------------------------------------------------------------


def state(generator: torch.Generator | None = None) -> Tensor:
    if generator is not None:
        return generator.get_state()
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


@pytest.mark.parametrize(
    "call",
    [
        lambda **g: torch.rand(9, **g, **on),
        lambda **g: torch.randn(9, **g, **on),
        lambda **g: torch.randint(9, (9,), **g, **on),
        lambda **g: empty(9).uniform_(**g),
        lambda **g: empty(9).bernoulli_(0.5, **g),
        lambda **g: torch.normal(empty(9).zero_(), 1.0, **g),
    ],
)
def test_a_generator_of_ones_own(call: Callable[..., Tensor]) -> None:
    """Equal generators give equal numbers, the default one's too, and no other moves."""
    own = torch.Generator(DEVICE).manual_seed(5)
    (want,) = drawn(call)
    with gems_compile.use_gems(only=SERVED):
        before = state()
        got = call(generator=own)
        assert torch.equal(state(), before)
        kept = own.get_state()
        following = call(generator=own)
        own.set_state(kept)
        assert torch.equal(call(generator=own), following)
    assert torch.equal(got, want) and not torch.equal(following, want)
    assert sum(row["ours"] for row in eager.stats().values()) == 4, eager.stats()


def test_a_call_moves_the_generator_by_one_seed() -> None:
    """Whatever it draws, and however many: so the next call's numbers do not depend on it."""
    calls = [call for name, call in CALLS.items() if name != "native_dropout"]
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64, **on).random_(-(2**63), 2**63 - 1)
    moved = state()
    for call in (*calls, lambda d: torch.rand(1000, dtype=d, **on), CALLS["native_dropout"]):
        drawn(call, torch.float32)
        assert torch.equal(state(), moved)


def test_a_call_that_is_atens_draws_from_the_same_generator() -> None:
    call = lambda g: torch.randn(4, dtype=torch.complex64, generator=g, **on)  # noqa: E731
    want = call(torch.Generator(DEVICE).manual_seed(3))
    with gems_compile.use_gems(only=SERVED):
        assert torch.equal(call(torch.Generator(DEVICE).manual_seed(3)), want)
        assert not ours("randn.generator")
        if DEVICE == "cuda":
            with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
                torch.rand(3, generator=torch.Generator(), **on)
    torch.manual_seed(0)
    want = torch.rand(0, **on), torch.rand(5, dtype=torch.complex64, **on)
    got = drawn(lambda: (torch.rand(0, **on), torch.rand(5, dtype=torch.complex64, **on)), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_threads_do_not_share_a_generator_unless_they_want_to() -> None:
    def program(seed: int, out: list[Tensor]) -> None:
        own = torch.Generator(DEVICE).manual_seed(seed)
        out += [torch.rand(5, generator=own, **on) for _ in range(6)]
        out += [empty(5).normal_(generator=own) for _ in range(6)]

    want: dict[int, list[Tensor]] = {seed: [] for seed in range(4)}
    got: dict[int, list[Tensor]] = {seed: [] for seed in range(4)}
    with gems_compile.use_gems(only=SERVED):
        for seed in want:
            program(seed, want[seed])
        threads = [threading.Thread(target=program, args=item) for item in got.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in want:
        assert all(torch.equal(a, b) for a, b in zip(got[seed], want[seed], strict=True))
    assert not torch.equal(want[0][0], want[1][0])

    torch.manual_seed(1)
    shared: list[Tensor] = []
    with gems_compile.use_gems(only=SERVED):  # no seed is drawn twice from the default one
        threads = [
            threading.Thread(target=lambda: shared.extend(torch.rand(5, **on) for _ in range(6)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({tuple(t.tolist()) for t in shared}) == 24


@pytest.mark.gpu
def test_replays_of_a_captured_graph_draw_anew() -> None:
    dropped = lambda: CALLS["native_dropout"](torch.float32)[1]  # noqa: E731
    calls = [lambda: torch.rand(64, **on), lambda: empty(64).normal_(), dropped]
    with gems_compile.use_gems(only=SERVED):
        for call in calls:
            call()  # a kind that is new while it is captured is ATen's
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]
        served = sum(row["ours"] for row in eager.stats().values())

        def replayed(seed: int) -> list[list[Tensor]]:
            torch.cuda.manual_seed(seed)
            found = []
            for _ in range(3):
                graph.replay()
                found.append([r.clone() for r in results])
            return found

        first, again = replayed(4), replayed(4)
        torch.cuda.manual_seed(4)
        plain = [call() for call in calls]
    assert served == 2 * len(calls), eager.stats()
    for a, b, c in zip(*first, strict=True):
        assert not torch.equal(a, b) and not torch.equal(b, c) and not torch.equal(a, c)
    for a, b in zip(first, again, strict=True):
        assert all(map(torch.equal, a, b))
    assert all(map(torch.equal, first[0], plain))


# the rest of torch -------------------------------------------------------------------------------


def test_errors_are_atens() -> None:
    with gems_compile.use_gems(only=SERVED):
        for call, said in (
            (lambda: empty(3).uniform_(2, 1), "from"),
            (lambda: empty(3).normal_(0, -1), "std"),
            (lambda: empty(3).bernoulli_(1.5), "p"),
            (lambda: empty(3).exponential_(-1), "lambda"),
            (lambda: empty(3).cauchy_(0, -1), "sigma"),
            (lambda: empty(3).log_normal_(0, 0), "std"),
            (lambda: torch.randint(5, 5, (3,), **on), "from"),
            (lambda: torch.randint(0, 300, (3,), dtype=torch.uint8, **on), "out of bounds"),
            (lambda: torch.rand(3, dtype=torch.int64, **on), "not implemented|dtype"),
            (lambda: torch.empty(1, 3, **on).expand(4, 3).uniform_(), "single memory location"),
        ):
            with pytest.raises((RuntimeError, NotImplementedError), match=said):
                call()
    assert not any(row["ours"] for row in eager.stats().values())


def test_wide_ranges_of_whole_numbers_are_atens() -> None:
    call = lambda: torch.randint(-(2**62), 2**62, (9,), **on)  # noqa: E731
    torch.manual_seed(5)
    assert torch.equal(drawn(call)[0], (torch.manual_seed(5), call())[1])
    (got,) = drawn(lambda: torch.randint(-(2**31), 2**31, (1000,), **on))
    assert got.min() < -(2**30) and got.max() > 2**30 and ours("randint.low") == 1


def test_dropout_and_its_gradient() -> None:
    a = torch.randn(40, 33, requires_grad=True, **on)
    with gems_compile.use_gems(only=SERVED):
        y = F.dropout(a, 0.25)
        (grad,) = torch.autograd.grad(y.sum(), a)
    kept = y != 0
    assert abs(kept.float().mean() - 0.75) < 0.06
    assert torch.allclose(grad, kept / 0.75) and torch.allclose(y, a * kept / 0.75)
    assert ours("native_dropout") + ours("bernoulli_.float") == 1


def test_leaves_transforms_and_initialisation() -> None:
    with gems_compile.use_gems(only=SERVED):
        a = torch.randn(3, 4, requires_grad=True, **on)
        assert a.is_leaf and a.requires_grad
        rows = torch.func.vmap(lambda r: r + torch.rand_like(r), randomness="different")(a.detach())
        assert not torch.equal(rows[0] - a[0], rows[1] - a[1])
        weight = torch.nn.Linear(8, 4, **on).weight
        torch.nn.init.trunc_normal_(weight, std=0.5, a=-0.7, b=0.7)
    assert weight.requires_grad and weight.abs().max() <= 0.7 and ours("uniform_")


def test_compiled_code_keeps_its_numbers_in_an_enabled_process() -> None:
    f = lambda a: F.dropout(a, 0.5) + torch.rand_like(a)  # noqa: E731
    a = torch.randn(8, 16, **on)
    compiled = compile_(f)
    compiled(a)
    torch.manual_seed(7)
    want = compiled(a)
    with gems_compile.use_gems(only=["randint", "randint.low"]):
        torch.manual_seed(7)
        assert torch.equal(compiled(a), want)
    assert eager.stats() == {}
