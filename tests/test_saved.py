"""A compiled graph as text: its constants, and its kernels where their binaries are missing."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gems_only
from test_launch import copy_source

from gems_compile.kernels.target import compile_target
from gems_compile.lowering import load
from gems_compile.lowering.constants import Unsaveable, meant, spelled
from gems_compile.lowering.options import Options
from gems_compile.lowering.report import Report
from gems_compile.lowering.saved import COUNTS, Saved

pytestmark = gems_only
aten = torch.ops.aten

CONSTANTS = [
    aten.mm.default,
    aten.add_.Tensor,
    torch.bfloat16,
    torch.strided,
    torch.channels_last,
    torch.device("cpu"),
    torch.device("cuda", 1),
    operator.getitem,
    operator.floordiv,
    torch.sym_max,
    max,
    complex(float("nan"), float("-inf")),
]


@pytest.mark.parametrize("value", CONSTANTS, ids=range(len(CONSTANTS)))
def test_constants_are_found_again(value: Any) -> None:
    again = meant(json.loads(json.dumps(spelled(value))))
    assert again is value or repr(again) == repr(value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, float("nan"), -0.0]),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int8),
        torch.tensor(3.0, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.empty(0, 3),
    ],
    ids=["float", "int8", "bfloat16", "bool", "complex", "empty"],
)
def test_constant_tensors_are_found_again(tensor: torch.Tensor) -> None:
    again = meant(json.loads(json.dumps(spelled(tensor))))
    assert (again.dtype, again.shape, again.device) == (tensor.dtype, tensor.shape, tensor.device)
    torch.testing.assert_close(again, tensor, rtol=0, atol=0, equal_nan=True)


class Mine:
    pass


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Mine(), "it uses Mine, which only this process has"),
        (lambda x: x, "it uses function"),
        (torch.ops.higher_order.cond, "it uses"),
        (torch.zeros(100_000), "it holds a constant tensor of 400000 bytes"),
        (torch.zeros(4, 4).t()[1:], "not plain data"),
        (torch.nn.Parameter(torch.zeros(2)), "not plain data"),
    ],
    ids=["object", "function", "higher_order", "large", "strided", "parameter"],
)
def test_other_things_are_not_kept(value: Any, why: str) -> None:
    with pytest.raises(Unsaveable, match=why):
        spelled(value)


def saved(folder: Path, text: str | None = None) -> Saved:
    """A graph of one kernel for a GPU, as read from a file; no GPU is needed to get this far."""
    source = copy_source()
    kernel = {"name": source.name, "text": text or source.text, "meta": source.meta}
    data = {
        "wrapper": "def call(args):\n    return ()\n",
        "device": ["cuda", 0],
        "constants": {"f0": ["op", "aten.mm.default"]},
        "sources": [{**kernel, "dtypes": source.pointer_dtypes}],
        "kernels": {"k0": 0, "k1": 0},
        "wide": {},
        "runs": [],
        "counts": dict.fromkeys(COUNTS, 1),
        "layout": {},
        "captures": None,
        "more": {},
    }
    options = Options(target=compile_target("nvidia", 90), cache_dir=str(folder), threads=2)
    return Saved(json.dumps(data), options, Report("graph"))


def test_missing_binaries_are_compiled_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    started = torch.cuda.is_initialized()  # by another test
    first = saved(tmp_path)
    (loading,) = first.loading.values()
    assert loading.key == copy_source().key and loading.compiled
    assert first.failure() is None and torch.cuda.is_initialized() == started
    (binary,) = tmp_path.rglob("*.cubin")
    (again,) = saved(tmp_path).loading.values()
    assert not again.compiled  # it is there
    binary.unlink()
    assert saved(tmp_path).failure() is None and binary.exists()


def test_a_binary_that_went_meanwhile_is_compiled_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert saved(tmp_path).failure() is None
    (loading,) = saved(tmp_path).loading.values()
    (binary,) = tmp_path.rglob("*.cubin")
    binary.unlink()
    compiled = []
    monkeypatch.setattr(load, "do", lambda job: compiled.append(job) or binary.write_bytes(b"x"))
    monkeypatch.setattr(load, "static_launcher", lambda source, record, *_: record["path"])
    monkeypatch.setattr(load, "_launchers", {})
    assert loading.result() == str(binary) and len(compiled) == 1


def test_a_kernel_that_does_not_compile_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wrong = copy_source().text.replace("tl.arange", "tl.arrange")
    failure = saved(tmp_path, wrong).failure()
    assert failure is not None and "arrange" in str(failure)


def test_a_kernel_of_no_use_is_remembered(tmp_path: Path) -> None:
    first = saved(tmp_path)
    (loading,) = first.loading.values()
    loading.mark_useless("OSError: no space")  # may have passed
    saved(tmp_path)
    loading.mark_useless("copy: out of shared memory")
    with pytest.raises(Unsaveable, match=r"copy is of no use here .*shared memory"):
        saved(tmp_path)
    assert first.failure() is None


def test_an_op_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError):
        meant(["op", "aten.no_such_op.default"])
