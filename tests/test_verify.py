"""`options={"verify": True}`: right kernels pass, wrong ones are named, and what cannot be checked
is counted."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, gems_only, ints, rand
from torch import nn
from torch.nn import functional as F
from wrongly import make_wrong

import gems_compile
from gems_compile.backend import Gems
from gems_compile.errors import GemsError, VerifyError
from gems_compile.insight.compare import Judge, as_eager
from gems_compile.insight.reference_text import functions
from gems_compile.insight.replay import main as replay
from gems_compile.lowering.binding import bind

pytestmark = gems_only


def verified(fn, *inputs, dynamic=None, backward=False, **options):
    """fn's results and the reports, with every launch compared."""
    backend = Gems()
    compiled = torch.compile(
        fn, backend=backend, dynamic=dynamic, options={"verify": True, **options}
    )
    result = compiled(*inputs)
    if backward:
        result.square().mean().backward()
    return result, backend.reports


def assert_all_checked(reports, kinds: int = 1) -> None:
    assert len(reports) == kinds
    for report in reports:
        assert report.launches, "nothing was launched"
        assert sum(report.verified.checked.values()) == report.launches
        assert report.verified.unchecked == {} == report.verified.partly


# right programs ----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(24), nn.Linear(24, 24)

    def forward(self, x):
        return F.dropout(F.gelu(self.up(self.norm(x))) + x, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_with_dropout_forward_and_backward(dtype) -> None:
    model, x = Block().to(DEVICE, dtype), rand(40, 24, dtype=dtype, grad=True)
    _, reports = verified(model, x, backward=True)
    assert_all_checked(reports, kinds=2)


@pytest.mark.parametrize("numerics", ["eager", "fast"])
def test_softmax_and_cross_entropy(numerics) -> None:
    def fn(x, y):
        return F.cross_entropy(x * 3, y, label_smoothing=0.1) + x.softmax(-1).amax()

    x, y = rand(33, 50, dtype=torch.bfloat16, grad=True), ints(33, high=50)
    _, reports = verified(fn, x, y, backward=True, numerics=numerics)
    assert_all_checked(reports, kinds=2)


def test_rows_that_several_programs_reduce() -> None:
    """The first of two launches stores steps alone, and is checked with the second."""
    x = rand(8, 6, 16, 16)
    x = x.contiguous(memory_format=torch.channels_last)
    _, (report, *_) = verified(nn.BatchNorm2d(6).to(DEVICE), x)
    assert report.verified.unchecked
    for name, why in report.verified.unchecked.items():
        assert re.search("is a step within .*; checked through fused_", why)
        assert f"{name}: not checkable: {why}" in str(report.verified)
    left = len(report.verified.unchecked)
    assert sum(report.verified.checked.values()) == report.launches - left


def test_updates_in_place() -> None:
    model = nn.Linear(12, 7).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    model(rand(5, 12)).sum().backward()
    backend = Gems()
    step = torch.compile(optimizer.step, backend=backend, options={"verify": True})
    for _ in range(2):
        step()
    assert all(sum(r.verified.checked.values()) for r in backend.reports)
    assert not any(r.verified.unchecked for r in backend.reports)


def test_a_copy_into_an_input_and_a_scatter() -> None:
    def fn(cache, place, x, total):
        cache[place] = x.relu()
        total.mul_(0.9).add_(x.sum(0))
        return cache.sum(1)

    _, reports = verified(fn, rand(9, 8), ints(3, high=9).unique(), rand(1, 8), rand(8))
    assert_all_checked(reports)


def test_sizes_that_change() -> None:
    backend = Gems()
    fn = torch.compile(
        lambda x: (x.exp() * x.shape[0]).sum(1),
        backend=backend,
        dynamic=True,
        options={"verify": True},
    )
    for rows in (5, 9):
        x = rand(rows, 17)
        torch.testing.assert_close(fn(x), (x.exp() * rows).sum(1))
    (report,) = backend.reports
    assert sum(report.verified.checked.values()) == 2 * report.launches


def test_no_cuda_graphs(caplog, monkeypatch) -> None:
    monkeypatch.setattr("gems_compile.backend._told", set())
    with caplog.at_level(logging.WARNING):
        _, (report,) = verified(lambda x: x.sin() + 1, rand(40), cudagraphs=True)
    assert report.captures is None
    assert "nothing is captured in CUDA graphs" in caplog.text


def test_it_costs_nothing_when_off(monkeypatch) -> None:
    watches = []

    def watched(*args):
        watches.append(args[-1])
        return bind(*args)

    monkeypatch.setattr("gems_compile.lowering.pipeline.bind", watched)
    backend = Gems()
    torch.compile(lambda x: x.sin() + 1, backend=backend)(rand(40))
    assert watches == [None]
    assert backend.reports[0].verified is None


# wrong programs ----------------------------------------------------------------------------------


def test_a_wrong_forward_is_named(monkeypatch, tmp_path: Path, capsys) -> None:
    names = make_wrong(monkeypatch, "gelu")
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path))
    with pytest.raises(VerifyError) as raised:
        verified(Block().to(DEVICE), rand(40, 24))
    said = str(raised.value)
    assert isinstance(raised.value, GemsError)
    head = r"graph 0_forward: (\w+)_[0-9a-f]{8} \(call \d\) is not as eager:"
    name = re.match(head, said)[1]
    assert name in names
    assert "960 of 960 elements differ" in said
    assert "test_verify.py" in said and "F.gelu(self.up(self.norm(x)))" in said
    folder = Path(re.search(r"kept in (\S+)", said)[1])
    assert folder.is_relative_to(tmp_path / "verify")
    _, options = re.search(r"python (\S+) (--check .*)", said).groups()
    assert replay(folder, options.split()) == 1
    assert name in capsys.readouterr().out


def test_a_wrong_backward_is_named(monkeypatch, tmp_path: Path) -> None:
    model, x = Block().to(DEVICE), rand(40, 24, grad=True)
    make_wrong(monkeypatch, "gelu_backward")
    with pytest.raises(VerifyError, match=r"graph 0_backward: \w+gelu_backward") as raised:
        verified(model, x, backward=True, dump=tmp_path)
    folder = Path(re.search(r"kept in (\S+)", str(raised.value))[1])
    assert folder.parent == tmp_path and (folder / "inputs.pt").is_file()


def test_a_wrong_store_in_place_is_named(monkeypatch, tmp_path: Path) -> None:
    def fn(total, x):
        total.add_(x.exp() * 2)

    make_wrong(monkeypatch, "exp")
    total, x = rand(30), rand(30)
    with pytest.raises(VerifyError, match="output copy_"):
        verified(fn, total, x, dump=tmp_path)


def test_wrong_at_other_sizes(monkeypatch, tmp_path: Path) -> None:
    """What is kept has the sizes of the call, not those of the trace."""
    fn = torch.compile(
        lambda x: x.exp() * x.shape[0],
        backend=Gems(),
        dynamic=True,
        options={"verify": True, "dump": tmp_path},
    )
    calls = []
    right = Judge.differences

    def differences(self, results):
        calls.append(results)
        return right(self, results if len(calls) == 1 else [r + 1 for r in results])

    monkeypatch.setattr(Judge, "differences", differences)
    fn(rand(5, 3))
    with pytest.raises(VerifyError) as raised:
        fn(rand(8, 3))
    folder = Path(re.search(r"kept in (\S+)", str(raised.value))[1])
    values = json.loads((folder / "report.json").read_text())["replay"]["values"]
    assert {tuple(v["shape"]) for v in values.values()} == {(8, 3)}
    monkeypatch.undo()
    assert replay(folder, ["--check", "--inputs", str(folder / "inputs.pt")]) == 0


def test_a_reference_that_fails_is_counted(monkeypatch, caplog) -> None:
    def fails(self, *args):
        raise RuntimeError("no such op here")

    monkeypatch.setattr(Judge, "__init__", fails)
    x = rand(40)
    with caplog.at_level(logging.WARNING):
        result, (report,) = verified(lambda x: x.sin() + 1, x)
    torch.testing.assert_close(result, x.sin() + 1)
    assert report.verified.checked == {}
    assert list(report.verified.unchecked.values()) == [
        "its reference fails (RuntimeError: no such op here)"
    ]
    assert "is not checked: no such op here" in caplog.text


def test_references_run_by_atens_own_kernels() -> None:
    with gems_compile.use_gems(only=["add"]):
        assert gems_compile.enabled_ops()
        with as_eager():
            assert not gems_compile.enabled_ops()
        assert gems_compile.enabled_ops()


# the judge ---------------------------------------------------------------------------------------


def judge(fn, *operands, **about) -> Judge:
    return Judge(lambda *a: (fn(*a),), lambda *a: (fn(*a),), operands, **about)


def test_twice_the_error_of_eager_is_allowed_and_no_more() -> None:
    x = torch.tensor([1.0, 2.0, 1e-3])
    asked = judge(lambda x: x * 3.7, x)
    near = torch.nextafter(x * 3.7, torch.tensor(9.0))
    assert asked.differences([near]) == []
    (found,) = asked.differences([x * 3.7 + torch.tensor([0.0, 1e-5, 0.0])])
    assert found.where == (1,) and found.count == 1 and found.numel == 3
    assert found.error == pytest.approx(1e-5, rel=0.1)


def test_a_sum_that_cancels_may_differ_by_its_terms() -> None:
    x = torch.tensor([1e6, 1.0, -1e6, 0.25])
    asked = judge(lambda x: x.sum(), x, length=4)
    assert asked.differences([torch.tensor(1.28)]) == []  # half a unit of a million
    assert asked.differences([torch.tensor(5.0)])


def test_what_cancels_within_may_differ_by_its_roundings() -> None:
    x = torch.linspace(-1, 1, 64)
    reference = """
import torch
def f(x):
    y = torch.ops.aten.mul.Tensor(x, 1.7)
    z = torch.ops.aten.sub.Tensor(y, torch.ops.aten.mean.default(y))
    return (torch.ops.aten.sum.default(z),)
"""
    plain, wide = (functions(reference, wide)["f"] for wide in (False, True))
    asked = Judge(plain, wide, [x], length=64)
    assert asked.differences([torch.tensor(6e-7)]) == []  # it is 0 but for 64 roundings
    assert asked.differences([torch.tensor(1e-4)])


def test_infinities_and_nans_stand_where_eager_has_them() -> None:
    x = torch.tensor([0.0, -1.0, 4.0])
    asked = judge(torch.log, x)
    want = x.log()
    assert asked.differences([want]) == []
    for wrong in ([0.0, float("nan"), want[2]], [want[0], 1.0, want[2]], [want[0], want[1], 1.0]):
        assert asked.differences([torch.tensor(wrong)])


def test_integers_are_equal() -> None:
    x = torch.arange(5)
    asked = judge(lambda x: x * 2, x)
    assert asked.differences([x * 2]) == []
    assert asked.differences([x * 2 + (x == 3)])[0].where == (3,)


def test_a_place_that_a_rounding_decides_may_be_another() -> None:
    x = torch.tensor([0.5, 0.5 + 2**-24, 0.1])
    asked = judge(lambda x: (x > 0.5).long(), x)
    assert asked.differences([torch.tensor([1, 0, 0])]) == []
    assert asked.differences([torch.tensor([0, 0, 1])])
