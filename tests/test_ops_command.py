"""``python -m gems_compile ops``: what it lists, in which words, and whether docs/ops.md is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from eagercheck import every_op, nothing_left  # noqa: F401

import gems_compile
from gems_compile import eager
from gems_compile.__main__ import main
from gems_compile.calls.worth import Measured, table_of
from gems_compile.commands import catalogue
from gems_compile.kernels.op import OPS
from gems_compile.kernels.target import compile_target, current_target

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "ops.md"


def printed(capsys: Any, *argv: str) -> str:
    assert main(["ops", *argv]) == 0
    return capsys.readouterr().out


def entry(name: str) -> catalogue.Entry:
    return {e.name: e for e in catalogue.entries()}[name]


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    made_with = re.search(r"overloads of torch (\S+)\. ", text)
    assert made_with is not None
    if made_with[1] != catalogue.made_with(torch.__version__):
        pytest.skip(f"made with torch {made_with[1]}, which has other overloads")
    again = "python -m gems_compile ops --markdown > docs/ops.md"
    assert text == catalogue.markdown(), f"write it again: {again}"


def test_the_document_names_every_op(capsys: Any) -> None:
    text = printed(capsys, "--markdown")
    assert text == catalogue.markdown()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    named = {f"aten.{r[0][3:-1]}.{overload}" for r in rows for overload in r[1].split(", ")}
    assert named == set(eager._declared())
    assert all(len(r) == 7 for r in rows)
    assert "| `add` | Tensor, Scalar | in-place, out= | `arithmetic.add` | numbers |" in text
    assert "| `_unique2` | default |  |  |  |  |  |" in text
    assert current_target().name not in text.split("| op |")[1]


def test_every_overload_is_listed(capsys: Any) -> None:
    found = json.loads(printed(capsys, "--json"))
    assert len(found) == len(eager._overloads())
    by_name = {e["name"]: e for e in found}
    gems_compile.enable()
    assert {name for name, e in by_name.items() if e["default"]} == set(gems_compile.enabled_ops())
    declared = {eager.aten_name(o): name for name, o in eager._declared().items()}
    for spelt, name in declared.items():
        kind = by_name[spelt]["kind"]
        assert kind == (OPS[name].kind if name in OPS else "composed")
        assert (kind == "composed") == (name not in OPS)
    forms = {e["name"]: e for e in found if e["form_of"]}
    assert set(forms) == set(by_name) - set(declared)
    assert forms["add_.Tensor"]["kind"] == "in-place form"
    assert forms["add_.Tensor"]["form_of"] == "add.Tensor"
    assert forms["add.out"]["kind"] == "out= form"


def test_one_entry() -> None:
    gelu = entry("gelu")
    assert (gelu.kind, gelu.kernel) == ("pointwise", "activation.gelu")
    assert gelu.dtypes == ("float16", "bfloat16", "float32")
    assert gelu.target == current_target().label
    for op in (gelu, entry("_softmax")):
        measured = table_of("nvidia:sm90").ops[op.name]
        assert (op.ratios, op.least) == (measured.ratios, measured.least) != ({}, None)
    softmax = entry("_softmax")
    assert "H200" in softmax.measured_on


def test_only(capsys: Any) -> None:
    text = printed(capsys, "--only", "softmax", "add_")
    assert re.findall(r"^  (\S+)", text, re.M) == [
        "overload",
        "_softmax",
        "_softmax.out",
        "add_.Scalar",
        "add_.Tensor",
    ]
    ratios = entry("_softmax").ratios.values()
    assert f"{min(ratios)} to {max(ratios)}" in text and "4 overloads, " in text


def test_a_typo(capsys: Any) -> None:
    assert main(["ops", "--only", "softmx"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ops --only: no op named 'softmx' is declared; close to it: softmax")


@pytest.mark.parametrize(
    "measured, on, why",
    [
        (Measured(None), False, "not measured"),
        (Measured(None, ratios={"4x4": 0.5}), False, "ATen's is faster"),
        (Measured(0, ratios={"4x4": 2.0}), True, "always"),
        (Measured(2**24, ratios={"4x4": 2.0}), True, "from 2^24 elements"),
        (
            Measured(1000, longest=16384, least_across=2**19),
            True,
            "from 1000 elements, rows of at most 2^14, across rows from 2^19",
        ),
    ],
)
def test_why_on_a_gpu(monkeypatch: Any, measured: Measured, on: bool, why: str) -> None:
    monkeypatch.setattr(eager, "why_not_replaced", lambda name, target: None)
    h200 = compile_target("nvidia", 90)
    assert catalogue._default("aten.gelu.default", h200, measured) == (on, why)


def test_why_elsewhere(monkeypatch: Any) -> None:
    assert catalogue._default("aten.gelu.default", None, Measured(0)) == (False, "there is no GPU")
    monkeypatch.setattr(eager, "why_not_replaced", lambda name, target: "because")
    target = current_target()
    assert catalogue._default("aten.gelu.default", target, Measured(0)) == (False, "because")


def test_without_a_target(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("gems_compile.kernels.target.current_target", lambda vendor=None: None)
    assert catalogue.main(False, False, ["gelu"]) == 0  # ``main`` would start the process again
    text = capsys.readouterr().out
    assert "On no target" in text and "2 overloads, 0 of them on by default" in text
