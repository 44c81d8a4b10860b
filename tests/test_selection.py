"""enable(all=, config=): what a call and a file ask for, and what is said of a mistake in them."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from eagercheck import nothing_left, ours, replaceable  # noqa: F401
from helpers import DEVICE, rand

import gems_compile
from gems_compile import eager
from gems_compile.calls import one_op
from gems_compile.errors import OptionError, UnknownOp
from gems_compile.kernels.target import compile_target

BOTH = pytest.mark.parametrize("call", [gems_compile.enable, gems_compile.use_gems])


def on() -> set[str]:
    return set(gems_compile.enabled_ops())


@pytest.fixture
def all_by_default(monkeypatch: Any) -> Any:
    """As by the interpreter, a GPU included: every op is on unasked, and all of its calls."""
    monkeypatch.setattr(eager, "_on_by_default", lambda name, target: True)
    monkeypatch.setattr(eager._State, "_is_measured", lambda self: False)
    eager._chosen.cache_clear()
    yield
    eager._chosen.cache_clear()


def aten(names: Any) -> set[str]:
    return {eager.aten_name(eager._overloads()[name]) for name in names}


# all ---------------------------------------------------------------------------------------------


def test_all_is_whatever_has_a_kernel() -> None:
    gems_compile.enable(all=True)
    assert on() == aten(replaceable())
    with gems_compile.use_gems(all=True, exclude=["softmax"]):
        assert aten(replaceable()) - on() == {"_softmax", "_softmax.out"}


def test_all_serves_what_is_not_faster() -> None:
    """On a GPU, where the default serves the calls that measured faster, and no form of an op."""
    h200, nothing = compile_target("nvidia", 90), frozenset()
    default = {n for n in eager._overloads() if eager._on_by_default(n, h200)}
    assert "aten.logsumexp.default" in default and "aten.add.Tensor" not in default
    assert not any(name.endswith("out") for name in default)
    if DEVICE == "cuda":  # its dispatcher knows which of these have a kernel there
        chosen = eager._chosen(None, nothing, True, h200, "enable")
        assert {"aten.add.Tensor", "aten.add.out"} <= chosen


def test_nobody_asked_for_the_default(all_by_default: None, monkeypatch: Any) -> None:
    """Its calls are looked at one by one where there are measurements; those of ``all`` are not."""
    monkeypatch.setattr(eager._State, "_is_measured", lambda self: True)
    monkeypatch.setattr(one_op, "least_elements", lambda name, target: sys.maxsize)
    handler = eager._state.handler("aten.gelu.default")
    gems_compile.enable()
    assert handler.least == sys.maxsize
    F.gelu(rand(4))
    with gems_compile.use_gems(all=True):
        F.gelu(rand(4))
    assert handler.least == sys.maxsize
    with gems_compile.use_gems(only=["gelu"]):
        assert handler.least is None
        F.gelu(rand(4))
    assert (ours("gelu"), handler.left) == (2, 1)


@BOTH
def test_all_contradicts_only(call: Any) -> None:
    with pytest.raises(OptionError, match=r"\(all=True, only=...\): .* give one of the two"):
        call(all=True, only=["gelu"])
    assert not on()


# files -------------------------------------------------------------------------------------------


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


toml = pytest.mark.skipif(
    not (_has("tomllib") or _has("tomli")), reason="Python 3.10 without tomli"
)
yaml = pytest.mark.skipif(not _has("yaml"), reason="PyYAML is not installed")


@pytest.mark.parametrize(
    "name, text",
    [
        pytest.param(
            "gems.toml",
            'only = ["gelu", "exp"]\nexclude = "exp.out"\nrecord = "{record}"\n',
            marks=toml,
        ),
        pytest.param(
            "gems.YML",
            "only: [gelu, exp]\nexclude: exp.out\nrecord: '{record}'\n",
            marks=yaml,
        ),
    ],
)
def test_a_file_holds_the_arguments(tmp_path: Path, name: str, text: str) -> None:
    record = tmp_path / "served.txt"
    path = written(tmp_path, name, text.format(record=record))
    with gems_compile.use_gems(config=path):
        assert on() == {"gelu", "gelu.out", "exp"}
        F.gelu(rand(4))
    assert record.read_text() == "gelu 1\n"
    gems_compile.enable(config=str(path), only="gelu")  # what the call says counts
    assert on() == {"gelu", "gelu.out"}


@toml
def test_the_file_of_the_documentation(tmp_path: Path, monkeypatch: Any) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "eager.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gems.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    with gems_compile.use_gems(config="gems.toml"):
        assert on() == {"_softmax", "native_layer_norm", "native_layer_norm.out"}
        rand(4, 5).softmax(-1)
    assert Path("served.txt").read_text() == "_softmax 1\n"


@toml
def test_all_in_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "gems.toml", "all = true\n")
    gems_compile.enable(config=path)
    assert on() == aten(replaceable())
    with pytest.raises(OptionError, match="all=True, only="):
        gems_compile.enable(config=path, only=["gelu"])


@toml
@pytest.mark.parametrize(
    "text, said",
    [
        ("onyl = []", "key 'onyl' is unknown; valid: only, exclude, all, record; close to it: "),
        ("all = 'yes'", "all = 'yes': it is true or false"),
        ("all = 'True'", "all = 'True': it is true or false; close to it: true"),
        ("only = 3", "only = 3: it is a name of ops or a list of names"),
        ("only = [['gelu']]", "it is a name of ops or a list of names"),
        ("record = 1", "record = 1: it is the path of a file"),
        ("only = [", "gems.toml is no TOML: "),
    ],
)
@BOTH
def test_mistakes_in_a_file(tmp_path: Path, call: Any, text: str, said: str) -> None:
    path = written(tmp_path, "gems.toml", text)
    with pytest.raises(OptionError) as error:
        call(config=path)
    assert said in str(error.value) and str(path) in str(error.value)
    assert not on()


@toml
def test_an_unknown_op_in_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "gems.toml", 'only = ["softmx"]')
    with pytest.raises(UnknownOp, match=r"'softmx' is declared; close to it: .*softmax"):
        gems_compile.enable(config=path)


def test_other_mistakes_with_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ends in '\.json'; valid: \.toml, \.yaml, \.yml"):
        gems_compile.enable(config=tmp_path / "gems.json")
    with pytest.raises(FileNotFoundError):
        gems_compile.enable(config=tmp_path / "gems.toml")


@yaml
def test_yaml_that_is_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds a list; it should hold some of the keys only"):
        gems_compile.enable(config=written(tmp_path, "gems.yaml", "- gelu"))
    with pytest.raises(OptionError, match=r"gems\.yaml is no YAML: while"):
        gems_compile.enable(config=written(tmp_path, "gems.yaml", "only: [gelu"))


@pytest.mark.parametrize("name, reader", [("gems.toml", "tomli"), ("gems.yaml", "PyYAML")])
def test_a_reader_that_is_not_installed(
    tmp_path: Path, monkeypatch: Any, name: str, reader: str
) -> None:
    for module in ("tomllib", "tomli", "yaml"):
        monkeypatch.setitem(sys.modules, module, None)
    path = written(tmp_path, name, "")
    with pytest.raises(OptionError, match=rf"{reader}, which is not .*gems-compile\[config\]"):
        gems_compile.enable(config=path)


# blocks ------------------------------------------------------------------------------------------


def test_a_block_whose_ops_are_on_touches_none_of_them(
    all_by_default: None, monkeypatch: Any
) -> None:
    gems_compile.enable()
    touched: list[str] = []
    for method in ("register", "unregister", "be_picky"):
        monkeypatch.setattr(one_op.Handler, method, lambda self, *_: touched.append(self.name))
    with gems_compile.use_gems(), gems_compile.use_gems():
        F.gelu(rand(4))
    assert not touched and ours("gelu") == 1


def test_one_op_that_was_asked_for_touches_nothing(monkeypatch: Any) -> None:
    gems_compile.enable(only=["gelu", "exp"])
    touched: list[str] = []
    for method in ("register", "unregister", "be_picky"):
        monkeypatch.setattr(one_op.Handler, method, lambda self, *_: touched.append(self.name))
    seen = eager._state.applied
    gems_compile.ops.gelu(rand(4))
    assert eager._state.applied is seen and not touched and ours("gelu") == 1


def test_a_block_touches_what_changes_alone(all_by_default: None, monkeypatch: Any) -> None:
    gems_compile.enable()
    touched: list[str] = []
    be_picky = one_op.Handler.be_picky
    monkeypatch.setattr(
        one_op.Handler, "be_picky", lambda self, p: (touched.append(self.name), be_picky(self, p))
    )
    with gems_compile.use_gems(exclude=["gelu", "exp"]):
        assert not {"gelu", "exp"} & on() and not touched
    assert sorted(touched) == ["exp", "exp.out", "gelu", "gelu.out"]


def test_one_block_in_several_threads_and_in_itself() -> None:
    block, failed = gems_compile.use_gems(only=["gelu"]), []
    ready = threading.Barrier(4)

    def enter() -> None:
        try:
            ready.wait(10)
            for _ in range(50):
                with block, block:
                    assert "gelu" in on()
                    F.gelu(rand(4))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and not on() and ours("gelu") == 4 * 50


def test_a_record_ends_with_its_block() -> None:
    """One of an outer block tells nothing of an inner one, and goes on behind it."""
    outer: list[str] = []
    inner: list[str] = []
    a = rand(4)
    with gems_compile.use_gems(only=["exp", "gelu", "sin"], record=outer.append):
        with gems_compile.use_gems(only=["exp", "gelu"], record=inner.append):
            a.exp()
        with gems_compile.use_gems(only=["exp", "gelu", "sin"]):
            a.sin()
        F.gelu(a)
    with gems_compile.use_gems(only=["exp", "gelu", "sin"]):
        a.sin()
    assert (outer, inner) == (["gelu"], ["exp"])
