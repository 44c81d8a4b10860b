"""Bags of embeddings behind eager PyTorch: sums, means and maxima, and their gradients."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from eagercheck import nothing_left, ours, whys  # noqa: F401
from helpers import DEVICE, FLOATS, assert_same_metadata, ints, rand
from machine_code import assembly
from opcheck import options
from test_eager_sizes import kernels_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import gems_compile
from gems_compile.calls import bags
from gems_compile.calls.composed import composed_graph
from gems_compile.calls.one_call import compile_one
from gems_compile.config import Config
from gems_compile.kernels.target import compile_target, current_target
from gems_compile.lowering import bag_kernels
from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.whole import WHOLE

aten = torch.ops.aten
FORWARD, ONLY = "_embedding_bag", "_embedding_bag_forward_only"
TABLE = "_embedding_bag_dense_backward"
SAMPLES = "_embedding_bag_per_sample_weights_backward"
NAMES = [FORWARD, ONLY, TABLE, SAMPLES]
MODES = ["sum", "mean", "max"]


@pytest.fixture(autouse=True)
def any_order() -> None:
    """Sums may be atomic: where deterministic algorithms are asked for, scatters are ATen's."""
    torch.use_deterministic_algorithms(False)


def run(weight: Tensor, scales: Tensor | None, *where: Tensor, **how: Any) -> list[Tensor]:
    """The bags, the gradients of the table and of weights of samples, the bags without any."""
    weight = weight.detach().requires_grad_()
    scales = None if scales is None else scales.detach().requires_grad_()

    def forward(weight: Tensor, scales: Tensor | None) -> Tensor:
        indices, offsets = where
        return F.embedding_bag(indices, weight, offsets, per_sample_weights=scales, **how)

    y = forward(weight, scales)
    given = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
    leaves = [t for t in (weight, scales) if t is not None]
    gradients = torch.autograd.grad(y, leaves, given)
    plain = forward(weight.detach(), None if scales is None else scales.detach())
    return [y.detach(), *gradients, plain]


def check(weight: Tensor, scales: Tensor | None, *where: Tensor, **how: Any) -> None:
    """Ours are as near float64 as ATen's, and came from kernels."""
    try:
        want = run(weight, scales, *where, **how)
    except NotImplementedError as error:  # gradients in bfloat16, on a GPU
        pytest.skip(f"ATen has no such kernel there: {error}")
    wide = None if scales is None else scales.double()
    exact = run(weight.double(), wide, *where, **how)
    names = NAMES if scales is not None else NAMES[:3]
    before = [ours(name) for name in names]
    with gems_compile.use_gems(only=NAMES):
        got = run(weight, scales, *where, **how)
    for name, count in zip(names, before, strict=True):
        assert ours(name) > count, f"{name}: {whys(name)}"
    for k, (a, b, c) in enumerate(zip(got, want, exact, strict=True)):
        assert_same_metadata(a, b, f"result {k}")
        # eager is lucky with few sums of few terms
        assert_accurate(a, b, c, f"result {k}", "tensor", least=4.0)


def offsets(*places: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(places, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("padding", [None, 3, 0])
@pytest.mark.parametrize("mode", MODES)
def test_bags(mode: str, padding: int | None, index: torch.dtype, dtype: torch.dtype) -> None:
    """One of them is empty."""
    torch.manual_seed(0)
    where = ints(23, high=11, dtype=index), offsets(0, 2, 2, 15, dtype=index)
    check(rand(11, 5, dtype=dtype), None, *where, mode=mode, padding_idx=padding)


@pytest.mark.parametrize("width", [1, 33, 300])
@pytest.mark.parametrize("mode", MODES)
def test_widths(mode: str, width: int) -> None:
    """Of one column, of some, of more than a program has."""
    where = ints(40, high=7), offsets(0, 1, 30)
    check(rand(7, width), None, *where, mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_last_offset(mode: str) -> None:
    where = ints(9, high=7), offsets(0, 4, 4, 9)
    check(rand(7, 6), None, *where, mode=mode, include_last_offset=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("padding", [None, 2])
def test_weights_of_samples(padding: int | None, dtype: torch.dtype) -> None:
    where = ints(40, high=9), offsets(0, 3, 3, 31)
    check(rand(9, 33, dtype=dtype), rand(40, dtype=dtype), *where, mode="sum", padding_idx=padding)


@pytest.mark.parametrize("mode", MODES)
def test_all_is_padding(mode: str) -> None:
    weight = rand(4, 5)
    where = torch.full((6,), 2, device=DEVICE), offsets(0, 3)
    check(weight, None, *where, mode=mode, padding_idx=2)
    with gems_compile.use_gems(only=NAMES):
        assert not F.embedding_bag(*where[:1], weight, where[1], mode=mode, padding_idx=2).any()


@pytest.mark.parametrize("mode", MODES)
def test_one_bag_of_many(mode: str) -> None:
    """Longer than what is loaded, or counted, at a time."""
    torch.manual_seed(0)
    check(rand(50, 4), None, ints(300, high=50), offsets(0), mode=mode, padding_idx=1)


@pytest.mark.parametrize("mode", MODES)
def test_tables_and_indices_with_gaps(mode: str) -> None:
    torch.manual_seed(0)
    table = rand(6, 9).mT
    spread = ints(40, high=9)[::2]
    check(table, None, spread, torch.stack([offsets(0, 5, 9)] * 2, 1)[:, 0], mode=mode)


def test_rows() -> None:
    """Indices in rows are bags of one size."""
    rows, weight = ints(5, 4, high=7), rand(7, 6)
    want = F.embedding_bag(rows, weight)
    with gems_compile.use_gems(only=NAMES):
        got = F.embedding_bag(rows, weight)
    assert ours(ONLY) == 1, whys(ONLY)
    torch.testing.assert_close(got, want)


def test_equal_maxima_and_what_is_no_number() -> None:
    """The first of equal ones has the gradient; no number stays where it comes first, as ATen's."""
    weight = torch.zeros(5, 3, device=DEVICE)
    weight[2, 0] = weight[3, 1] = float("nan")
    weight[4] = float("-inf")
    where = torch.tensor([0, 1, 2, 2, 0, 0, 2, 3, 4, 4], device=DEVICE), offsets(0, 3, 5, 8)
    want = aten._embedding_bag(weight, *where, False, 2)
    with gems_compile.use_gems(only=NAMES):
        got = aten._embedding_bag(weight, *where, False, 2)
    assert ours(FORWARD) == 1, whys(FORWARD)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [-1, 3])
def test_what_a_gpu_saves_for_backward(
    padding: int, last: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed here: the bag of each index, how many count, where maxima are and -1 of an empty
    bag. With the last offset a GPU has one more count, which it leaves as it is."""
    monkeypatch.setattr(bags, "as_a_gpu", lambda tensor: True)
    torch.manual_seed(0)
    weight, indices = rand(11, 5), ints(9, high=11)
    where = indices, offsets(0, 2, 2, 5, *([9] if last else []))
    how = False, MODES.index(mode), False, None, last, padding
    target = current_target()
    variant = bags_variant(weight, *where, *how, target=target)
    out, whose, counts, places = variant.run([weight, *where])
    want = F.embedding_bag(
        indices,
        weight,
        where[1],
        mode=mode,
        include_last_offset=last,
        padding_idx=None if padding < 0 else padding,
    )
    torch.testing.assert_close(out, want)
    assert whose.tolist() == [0, 0, 2, 2, 2, 3, 3, 3, 3]
    kept = [[i for i in part if i != padding] for part in split(indices.tolist(), (0, 2, 2, 5, 9))]
    assert counts.tolist() == [len(part) for part in kept] + [0] * last
    if mode != "max":
        assert places.shape == (0,)
        return
    for k, part in enumerate(kept):
        rows = weight[part].argmax(0) if part else None
        expected = [part[r] for r in rows.tolist()] if part else [-1] * 5
        assert places[k].tolist() == expected


def bags_variant(*args: Any, target: Any) -> Any:
    variant = compile_one(aten._embedding_bag.default, args, {}, target, Config.from_call())
    assert variant.run is not None, variant.why
    return variant


def split(indices: list[int], ends: tuple[int, ...]) -> list[list[int]]:
    return [indices[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_layouts_on_a_gpu(last: bool, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what torch's own rule says of all devices but a CPU."""
    monkeypatch.setattr(bags, "as_a_gpu", lambda tensor: True)

    def call(function: Any, device: str) -> Any:
        weight = torch.empty(11, 5, device=device, dtype=torch.bfloat16)
        indices = torch.zeros(9, dtype=torch.int32, device=device)
        return function(weight, indices, indices[:4], False, mode, False, None, last, -1)

    want = call(aten._embedding_bag.default, "meta")
    with FakeTensorMode():
        got = call(bags.embedding_bag, DEVICE)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_a_module_trains() -> None:
    torch.manual_seed(0)
    module = nn.EmbeddingBag(13, 6, mode="mean", padding_idx=0).to(DEVICE)
    start, where = module.weight.detach().clone(), (ints(30, high=13), offsets(0, 7, 7, 21))

    def losses() -> list[float]:
        module.weight.data.copy_(start)
        optimizer, found = torch.optim.SGD(module.parameters(), lr=0.5), []
        for _ in range(4):
            loss = (module(*where) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    want = losses()
    with gems_compile.use_gems(only=NAMES):
        got = losses()
    assert (ours(FORWARD), ours(TABLE)) == (4, 4), whys(FORWARD) + whys(TABLE)
    assert got == pytest.approx(want, rel=1e-5) and got[-1] < got[0]


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a sum is three launches: the bags, whose each index is, and how many there are."""
    monkeypatch.setattr(bags, "as_a_gpu", lambda tensor: True)
    reports = kernels_of(monkeypatch)
    given = rand(11, 5), ints(9, high=11), offsets(0, 2), False, 0, False, None, False, -1
    bags_variant(*given, target=current_target())
    (report,) = (r for r in reports if r.launches)
    names = [source.name for source in report.sources]
    assert report.launches == 3 and {"embedding_bags", "bag_of_each"} <= set(names)


def test_places_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors whose places 32 bits do not count, as far as a small machine can tell."""
    monkeypatch.setattr(bag_kernels, "NARROW", 10)
    reports = kernels_of(monkeypatch)
    for mode in MODES:
        where = ints(23, high=11), offsets(0, 2, 2, 15)
        check(rand(11, 5), None, *where, mode=mode, padding_idx=1)
    texts = [s.text for r in reports for s in r.sources if "bag" in s.name]
    assert texts and all("tl.program_id(0).to(tl.int64)" in text for text in texts)


def test_what_stays_atens() -> None:
    """float64, gradients by frequency, offsets of another dtype, sparse gradients: with reasons."""
    weight, indices, places = rand(7, 3), ints(9, high=7), offsets(0, 4)
    wide = weight.double().requires_grad_()
    leaf = weight.clone().requires_grad_()

    def calls() -> list[Tensor]:
        often = F.embedding_bag(indices, leaf, places, scale_grad_by_freq=True)
        return [
            F.embedding_bag(indices, wide, places),
            F.embedding_bag(indices, weight, places.int()),
            *torch.autograd.grad(often.sum(), leaf),
        ]

    want = calls()
    with gems_compile.use_gems(only=NAMES):
        got = calls()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert ours(FORWARD) == 1 and not ours(ONLY) and not ours(TABLE)  # the one by frequency
    assert any("float64" in why for why in whys(FORWARD))
    assert any("another dtype" in why for why in whys(FORWARD) + whys(ONLY))
    assert any("how often" in why for why in whys(TABLE))


def test_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are loaded 16 bytes a thread."""
    target, seen = compile_target("nvidia", 90), []
    for name, kernel in list(WHOLE.items()):
        noted = lambda v, t, w=kernel.write: seen.append(w(v, target)) or w(v, t)  # noqa: E731
        monkeypatch.setitem(WHOLE, name, kernel._replace(write=noted))
    monkeypatch.setattr(bags, "as_a_gpu", lambda tensor: True)
    table = torch.empty(1000, 128, dtype=torch.bfloat16, device=DEVICE)
    indices, places = (torch.zeros(n, dtype=torch.int64, device=DEVICE) for n in (4096, 256))
    for mode, padding in ((0, -1), (1, 3), (2, -1)):
        args = table, indices, places, False, mode, False, None, False, padding
        graph, *_ = composed_graph(aten._embedding_bag.default, args, {})
        compile_graph(graph, [], options())
    texts = {}
    for source in {s.text: s for s in seen}.values():
        source.meta.update(exact=True, unaligned=[])
        texts.setdefault(source.name, assembly(source, tmp_path))
    assert set(texts) == {"embedding_bags", "bag_sizes", "bag_of_each"}
    assert "ld.global.v4.b32" in texts["embedding_bags"]
