"""Users' pointwise functions: defined anew, in the caches, and mistakes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import authored
import pytest
import torch
from authorcheck import assert_like, launched, module
from authored import gelu_and_mul, plain, plus
from helpers import assert_same_values, gems_only, ints, rand
from torch import Tensor
from warmcheck import results, said

import gems_compile
from gems_compile.backend import Gems
from gems_compile.errors import AuthoringError
from gems_compile.lowering.whole_graphs import FROM_CACHE, KEPT

pytestmark = gems_only


# names and caches ---------------------------------------------------------------------------------

TIMES = """
@gems_compile.pointwise
@triton.jit
def times(x):
    # {comment}
    return x * {factor}
"""


def test_defined_anew(tmp_path: Path) -> None:
    """As when a notebook's cell is run again: what was compiled with the old one is compiled anew,
    or keeps it."""
    x = rand(5)
    old = module(tmp_path, TIMES.format(factor=2, comment="one"))
    same = module(tmp_path, TIMES.format(factor=2, comment="another"))
    new = module(tmp_path, TIMES.format(factor=3, comment="one"))
    assert old.times.op is same.times.op and old.times.op is not new.times.op
    box = ModuleType("box")
    compiled = torch.compile(lambda x: box.times(x) + 1, backend="gems")
    for made, factor in ((old, 2), (new, 3), (old, 2)):
        box.times = made.times
        assert_like(made.times(x), x * factor)
        assert_like(compiled(x), x * factor + 1)


def test_two_functions_of_one_name(tmp_path: Path) -> None:
    text = "C = {c}\n@triton.jit\ndef add(x):\n    return x + C\n" + (
        "@gems_compile.pointwise\n@triton.jit\ndef shift(x):\n    return add(x)\n"
    )
    one, two = (module(tmp_path, text.format(c=c)) for c in (1, 20))
    backend, x = Gems(), rand(5)
    got = torch.compile(lambda x: one.shift(two.shift(x)), backend=backend)(x)
    assert_like(got, x + 20 + 1)
    assert launched(backend) == (1, 0)


def test_what_a_body_may_use(tmp_path: Path) -> None:
    helpers = module(tmp_path, "LIMIT = 2.0\n@triton.jit\ndef twice(x):\n    return x * 2\n")
    sys.modules["authored_helpers"] = helpers
    made = module(
        tmp_path,
        "import authored_helpers as h\nfrom triton.language import float32 as wide\n"
        "inf = float('inf')\n"
        "@gems_compile.pointwise\n@triton.jit\n"
        "def clipped(x):\n"
        '    """A docstring: inf."""\n'
        "    limit = h.LIMIT\n"
        "    return tl.minimum(h.twice(x).to(wide), tl.minimum(inf, limit))\n",
    )
    x = rand(50)
    assert_like(made.clipped(x), (2 * x).clamp(max=2.0))


@pytest.mark.usefixtures("caches")
def test_caches_know_the_body_and_the_backward(tmp_path: Path) -> None:
    text = TIMES + "times.backward(lambda dy, x: dy * {slope})\n"

    def step(fn: Any) -> list[Tensor]:
        x = rand(5, grad=True)
        y = fn(x)
        y.sum().backward()
        return [y.detach(), x.grad]

    def run(factor: float, slope: float) -> set[str]:
        made = module(tmp_path, text.format(factor=factor, slope=slope, comment=""))
        (y, grad), reports = results(step, lambda: lambda x: made.times(x) + 1)
        torch.manual_seed(1)
        assert_same_values(y, rand(5) * factor + 1)
        assert_same_values(grad, torch.full_like(grad, slope))
        return said(reports)

    assert run(2, 2.0) == {KEPT}
    assert run(2, 2.0) == {FROM_CACHE}
    assert run(3, 2.0) == {KEPT}
    assert run(3, 5.0) == {KEPT}


PROGRAM = """
import json, os, sys
import torch
import authored, gems_compile
x, y = torch.linspace(-3, 3, 33), torch.linspace(0, 1, 33)
device = "cuda" if torch.cuda.is_available() else "cpu"
run = torch.compile(lambda x, y: authored.gelu_and_mul(x, y) * 2, backend="gems")
total = run(x.to(device), y.to(device)).double().sum().item()
reports = gems_compile.reports()
print(json.dumps([sorted({r.cache for r in reports}), sorted(reports[0].seconds), total]))
"""


def test_a_second_process_is_warm(tmp_path: Path) -> None:
    folders = {name: str(tmp_path) for name in ("GEMS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    env = {**os.environ, **folders, "GEMS_CACHE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    told = []
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True)
        told.append(json.loads(done.stdout.splitlines()[-1]))
    (cold, _, one), (warm, stages, two) = told
    assert cold == ["kept"] and warm == ["from the cache"]
    assert stages == ["bind", "load", "triton"] and one == two


# mistakes -----------------------------------------------------------------------------------------

BODY = "@triton.jit\ndef wrong({parameters}):\n    return {returns}\n"
MISTAKES = {
    "no Triton function": (
        "@gems_compile.pointwise\ndef wrong(x):\n    return x\n",
        r"is no function of triton.jit; write @gems_compile.pointwise above @triton.jit",
    ),
    "promotion": (
        "@gems_compile.pointwise(promotion='int_to_flot')\n"
        + BODY.format(parameters="x", returns="x"),
        r"wrong: the promotion 'int_to_flot' is unknown; valid: default, int_to_float, "
        r"always_bool, x; close to it: int_to_float",
    ),
    "rules": (
        "@gems_compile.pointwise(promotion=['default'], outputs=2)\n"
        + BODY.format(parameters="x", returns="x, x"),
        "promotion= has 1 rules for 2 outputs",
    ),
    "outputs": (
        "@gems_compile.pointwise(outputs=3)\n" + BODY.format(parameters="x", returns="x, x"),
        "wrong: its body returns 2 results, where outputs=3; write outputs=2",
    ),
    "no outputs": (
        "@gems_compile.pointwise(outputs=0)\n" + BODY.format(parameters="x", returns="x"),
        "outputs=0 is no number of results; at least 1",
    ),
    "no tensor": (
        "@gems_compile.pointwise\n" + BODY.format(parameters="x=1", returns="x"),
        r"none of its parameters \['x'\] is a tensor",
    ),
    "default": (
        "@gems_compile.pointwise\n" + BODY.format(parameters="x, y=None", returns="x"),
        "the default of y, None, is a NoneType; valid: float, int, bool, str",
    ),
    "a parameter named out": (
        "@gems_compile.pointwise\n" + BODY.format(parameters="x, out", returns="x"),
        "the parameter out cannot be one of an op's",
    ),
    "global": (
        "TABLE = [1, 2]\n@gems_compile.pointwise\n"
        + BODY.format(parameters="x", returns="x + TABLE[0]"),
        "its global 'TABLE' is a list; a body may use functions of triton.jit",
    ),
    "undefined": (
        "@gems_compile.pointwise\n" + BODY.format(parameters="x", returns="later(x)"),
        "'later' is not defined; what a body uses must be defined before it",
    ),
    "backward": (
        "@gems_compile.pointwise\n" + BODY.format(parameters="x, y", returns="x + y")
        + "slope = gems_compile.pointwise(wrong.function)\nwrong.backward(slope)\n",
        r"its backward wrong has 1 outputs for 2 tensors \(x, y\)",
    ),
    "backward of Triton": (
        "@gems_compile.pointwise\n" + BODY.format(parameters="x", returns="x")
        + "@wrong.backward\n@triton.jit\ndef slope(d, x):\n    return d\n",
        "needs @gems_compile.pointwise above it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_definition(tmp_path: Path, mistake: str) -> None:
    text, message = MISTAKES[mistake]
    with pytest.raises(AuthoringError, match=message):
        module(tmp_path, text)


def test_mistakes_in_a_call(tmp_path: Path) -> None:
    x = rand(4, 5)
    with pytest.raises(AuthoringError, match=r"a tensor is torch.complex64; kernels take"):
        plus(x.to(torch.complex64), x)
    with pytest.raises(AuthoringError, match=r"the result is float32\[4, 5\], its place"):
        plus(x, x, out=rand(5))
    with pytest.raises(AuthoringError, match=r"its place int64\[4, 5\]"):
        plus(x, x, out=ints(4, 5))
    with pytest.raises(RuntimeError, match="broadcast"):
        plus(x, rand(3))
    with pytest.raises(
        RuntimeError, match="'Tensor' for argument 'y' but instead found type 'float'"
    ):
        plus(x, 2.0)
    with pytest.raises(AuthoringError, match="'a b' cannot stand in a kernel"):
        gelu_and_mul(x, x, "a b")
    with pytest.raises(AuthoringError, match="out= has 2 tensors for 1 results"):
        plus(x, x, out=(x, x))
    with pytest.raises(AuthoringError, match="it takes x, y, alpha"):
        plus.inplace(x)
    many = "@gems_compile.pointwise(outputs=2)\n@triton.jit\ndef many(x):\n    return {}\n"
    with pytest.raises(AuthoringError, match="many"):
        module(tmp_path, many.format("tl.abs(x)")).many(x)
    wrong = module(
        tmp_path, BODY.format(parameters="x", returns="x") + "fix = lambda d, x: (d, d)\n"
        "wrong = gems_compile.pointwise(wrong, backward=fix)\n"
    )  # fmt: skip
    with pytest.raises(AuthoringError, match="its backward returned 2 gradients for 1 tensors"):
        wrong.wrong(rand(3, grad=True)).sum().backward()


def test_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gems_compile.user_ops.current_target", lambda vendor: None)
    monkeypatch.setattr(plus.served, "variants", {})
    with pytest.raises(AuthoringError, match="no GPU, and Triton's interpreter is off"):
        plus(rand(3), rand(3))


def test_the_documentation_runs(tmp_path: Path) -> None:
    gems_compile.gems.reset()
    text = (Path(__file__).parent.parent / "docs/authoring.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made = module(tmp_path, "\n".join(blocks))
    x, y = rand(4, 5), rand(5)
    assert_like(made.gelu_and_mul(x, y), plain(x, y))
    assert_same_values(made.was_cut, made.x > 0.5)


def test_what_python_shows() -> None:
    assert gelu_and_mul.__doc__ == "gelu(x) * y." and gelu_and_mul.__name__ == "gelu_and_mul"
    assert str(gelu_and_mul.op).startswith("gems_user.gelu_and_mul.v")
    assert authored.gelu_and_mul_backward.op is not gelu_and_mul.op
    assert "pointwise" in dir(gems_compile)
    assert copy.deepcopy([gelu_and_mul]) == [gelu_and_mul]
    assert pickle.loads(pickle.dumps(gelu_and_mul)) is gelu_and_mul
