"""Compiled kernels travel inside saved graphs: who loads one compiles nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gems_only
from test_launch import copy_source

from gems_compile import warm
from gems_compile.kernels.target import compile_target
from gems_compile.lowering import artifacts, binaries, load
from gems_compile.lowering.binaries import Binaries, from_state
from gems_compile.lowering.options import Options
from gems_compile.lowering.report import Report
from gems_compile.lowering.saved import COUNTS, Saved

pytestmark = gems_only
PROGRAM = Path(__file__).parent / "carried_program.py"
H100 = compile_target("nvidia", 90)
KEY = copy_source().key


# --------------------------------------------------------------------------- one graph, no GPU


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def text(name: str = "copy") -> str:
    """A graph of one kernel for a GPU, as it is saved."""
    source = copy_source()
    kernel = {"name": name, "text": source.text, "meta": source.meta}
    return json.dumps(
        {
            "wrapper": "def call(args):\n    return ()\n",
            "device": ["cuda", 0],
            "constants": {},
            "sources": [{**kernel, "dtypes": source.pointer_dtypes}],
            "kernels": {"k0": 0},
            "wide": {},
            "runs": [],
            "counts": dict.fromkeys(COUNTS, 1),
            "layout": {},
            "captures": None,
            "more": {},
        }
    )


def options(folder: Path | None, target: Any = H100) -> Options:
    return Options(target=target, cache_dir=None if folder is None else str(folder), threads=2)


def begun(folder: Path | None, carried: Binaries | None = None, target: Any = H100) -> Any:
    """The graph's kernel on its way, and the graph."""
    saved = Saved(text(), options(folder, target), Report("graph"), carried)
    (loading,) = saved.loading.values()
    return loading, saved


@pytest.fixture
def carried(tmp_path: Path) -> Binaries:
    """The graph's kernel, compiled elsewhere and pickled."""
    _, saved = begun(tmp_path / "elsewhere")  # which lives: a kernel of a graph that went is not
    found = load.binaries([KEY], options(tmp_path / "elsewhere"), None)  # waited for
    assert found.kernels and saved.failure() is None
    return from_state(pickle.loads(pickle.dumps(found.state())))  # type: ignore[return-value]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob(f"{KEY}.*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_what_came_along_is_not_compiled(tmp_path: Path, carried: Binaries) -> None:
    loading, saved = begun(tmp_path / "here", carried)
    assert not loading.compiled and saved.failure() is None
    assert files(tmp_path / "here") == files(tmp_path / "elsewhere")
    assert len(files(tmp_path / "here")) == 3
    assert not begun(tmp_path / "here")[0].compiled  # and it stays


def test_what_went_meanwhile_is_put_there_again(
    tmp_path: Path, carried: Binaries, monkeypatch: Any
) -> None:
    loading, _ = begun(tmp_path / "here", carried)
    shutil.rmtree(tmp_path / "here")
    os.makedirs(loading.folder)
    monkeypatch.setattr(load, "do", _not_compiled)
    monkeypatch.setattr(load, "static_launcher", lambda source, record, *_: record["path"])
    monkeypatch.setattr(load, "_launchers", {})
    assert os.path.exists(loading.result())


def _not_compiled(job: Any) -> None:
    raise AssertionError("compiled again")


def test_a_wide_form_comes_along(tmp_path: Path, carried: Binaries, monkeypatch: Any) -> None:
    """It is looked up when sizes first ask for it."""
    narrow = copy_source()
    narrow.text, narrow.widen = narrow.text + "# narrow", copy_source
    loading = load.Loading(narrow, options(tmp_path / "here"), 0, carried)
    assert loading.compiled
    loading.settle()
    monkeypatch.setattr(load.Pool, "submit", _not_compiled)
    monkeypatch.setattr(load, "static_launcher", lambda source, record, *_: record["path"])
    monkeypatch.setattr(load, "_launchers", {})
    assert loading.wide._compiled().endswith(f"{KEY}.cubin")


def test_without_a_folder(carried: Binaries, monkeypatch: Any, tmp_path: Path) -> None:
    """As where it cannot be written, or is another's: it goes where sources go."""
    monkeypatch.setattr(load, "private_directory", lambda: str(tmp_path / "private"))
    assert not begun(None, carried)[0].compiled
    assert len(files(tmp_path / "private")) == 3


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, carried: Binaries, monkeypatch: Any
) -> None:
    (tmp_path / "here").write_text("a file")
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(load, "private_directory", lambda: str(private))
    loading, _ = begun(tmp_path / "here", carried)
    assert not loading.compiled and len(files(private)) == 3


def test_a_full_disk(tmp_path: Path, carried: Binaries, monkeypatch: Any, caplog: Any) -> None:
    def full(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(binaries, "write_atomically", full)
    loading, saved = begun(tmp_path / "here", carried)
    assert loading.compiled and "No space left" in caplog.text
    assert saved.failure() is None


def _changed(place: int, change: Callable[[Any], Any]) -> Callable[[Binaries], Binaries]:
    def changed(whole: Binaries) -> Binaries:
        kernel: list[Any] = list(whole.kernels[KEY])
        kernel[place] = change(kernel[place])
        return replace(whole, kernels={KEY: tuple(kernel)})  # type: ignore[dict-item]

    return changed


def _other_record(record: bytes) -> Callable[[Binaries], Binaries]:
    """One whose digest is right."""

    def changed(whole: Binaries) -> Binaries:
        packed = whole.kernels[KEY][1]
        digest = binaries._digest(record, packed)
        return replace(whole, kernels={KEY: (record, packed, digest)})

    return changed


DAMAGE = {
    "binary": _changed(1, lambda data: data[:40] + b"?" + data[41:]),
    "cut": _changed(1, lambda data: data[:-40]),
    "record": _changed(0, lambda data: data.replace(b"copy", b"copi")),
    "digest": _changed(2, lambda digest: None),
    "type": _changed(0, lambda data: 7),
    "nothing": lambda whole: replace(whole, kernels={KEY: None}),
    "short": lambda whole: replace(whole, kernels={KEY: whole.kernels[KEY][:2]}),
    "no record": _other_record(b"[]"),
    "no JSON": _other_record(b"{"),
    "another place": _other_record(json.dumps({"binary": f"../{KEY}.cubin"}).encode()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_kernel_is_compiled(
    tmp_path: Path, carried: Binaries, caplog: Any, damage: str
) -> None:
    loading, saved = begun(tmp_path / "here", DAMAGE[damage](carried))
    assert loading.compiled and f"kernel {KEY} in a graph is not used" in caplog.text
    assert saved.failure() is None


@pytest.mark.parametrize("state", [7, [], {}, {"shelf": 1, "kernels": {}}, {"shelf": "a"}, b"x"])
def test_damaged_kernels_are_none(state: Any, caplog: Any) -> None:
    assert from_state(state) is None and "are not used" in caplog.text
    assert from_state(None) is None


def test_kernels_for_another_target(tmp_path: Path, carried: Binaries, caplog: Any) -> None:
    caplog.set_level("INFO", logger="gems_compile")
    loading, saved = begun(tmp_path / "here", carried, compile_target("nvidia", 80))
    assert loading.compiled and "they are for nvidia-90" in caplog.text
    assert saved.failure() is None
    assert all("nvidia-80" in name for name in files(tmp_path / "here"))
    there = load.binaries([KEY], options(tmp_path / "here", compile_target("nvidia", 80)), carried)
    assert "nvidia-80" in there.shelf
    assert there.kernels != carried.kernels


def test_kernels_of_another_version(
    tmp_path: Path, carried: Binaries, caplog: Any, monkeypatch: Any
) -> None:
    caplog.set_level("INFO", logger="gems_compile")
    monkeypatch.setattr(load, "library_digest", lambda: "another")
    loading, saved = begun(tmp_path / "here", carried)
    assert loading.compiled and saved.failure() is None


# --------------------------------------------------------------------------- pickles of graphs


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: Any) -> Iterator[warm.Graph]:
    """A graph that this process compiles for a GPU, which is said to be there."""
    monkeypatch.setattr(warm, "current_target", lambda vendor: H100)
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path / "elsewhere"))
    _, saved = begun(tmp_path / "elsewhere")
    made = warm.Graph()
    made.text = text()
    yield made
    assert saved.failure() is None


def test_a_graph_is_pickled_with_its_kernels(graph: warm.Graph, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(graph))
    loading, _ = begun(tmp_path / "here", again.carried)
    assert not loading.compiled
    again.carried = None
    loading.carried = None
    assert pickle.loads(pickle.dumps(again)).carried.kernels  # those of the kernel cache


def test_kernels_travel_on(graph: warm.Graph, tmp_path: Path) -> None:
    """Also from where they were not needed."""
    first = pickle.loads(pickle.dumps(graph))
    shutil.rmtree(tmp_path / "elsewhere")
    second = pickle.loads(pickle.dumps(first))
    assert second.carried == first.carried and first.carried.kernels


def test_a_kernel_that_is_not_there_is_left_out(graph: warm.Graph, tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(graph)).carried.kernels
    (binary,) = (tmp_path / "elsewhere").rglob("*.cubin")
    binary.write_bytes(b"")
    assert not pickle.loads(pickle.dumps(graph)).carried.kernels
    shutil.rmtree(tmp_path / "elsewhere")
    assert not pickle.loads(pickle.dumps(graph)).carried.kernels


def test_while_a_graph_compiles_nothing_is_waited_for(graph: warm.Graph) -> None:
    lookup = warm.whole_graphs.Lookup(warm.Graph, "", lambda graph: lambda args: args)
    with lookup.active():
        kept = pickle.dumps(graph)
    assert pickle.loads(kept).carried is None
    noted = artifacts.WithKernels(type("Noted", (), {"key": "k", "content": kept}))
    assert pickle.loads(noted.content).carried.kernels  # once it is saved
    assert artifacts.WithKernels(type("Noted", (), {"key": "k", "content": b"?"})).content == b"?"


def test_a_torch_that_keeps_artifacts_elsewhere(monkeypatch: Any) -> None:
    """Graphs are then saved as they are."""
    from torch.compiler._cache import CacheArtifactManager

    monkeypatch.delattr(CacheArtifactManager, "_new_cache_artifacts")
    with artifacts.with_kernels():
        pass


# --------------------------------------------------------------------------- two processes


def run(folder: Path, *arguments: str, **more: str) -> dict[str, Any]:
    caches = {name: str(folder / name) for name in ("GEMS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    env = {**os.environ, **caches, "GEMS_CACHE": "1", **more}
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_artifacts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a process tells that has the artifacts of another and no kernels, and that one."""
    file, again = folder / "artifacts", folder / "again"
    cold = run(folder / "one", "", str(file))
    assert cold["cache"] == ["kept"] and cold["compiled"] == cold["kernels"] != []
    found = run(folder / "two", str(file), str(again))
    assert found["cache"] == ["from the cache"] and found["kernels"] == cold["kernels"]
    assert found["compiled"] == []
    assert run(folder / "three", str(again))["compiled"] == []  # from one that compiled nothing
    return cold, found


@pytest.mark.skipif(torch.cuda.is_available(), reason="does so on a GPU, below")
def test_artifacts_carry_the_kernels(tmp_path: Path) -> None:
    check_artifacts(tmp_path)
    file = str(tmp_path / "artifacts")
    older = run(tmp_path / "four", file, PRETENDED_ARCH="80")
    assert older["cache"] == ["kept"] and older["compiled"] == older["kernels"]


@pytest.mark.gpu
def test_artifacts_carry_the_kernels_on_a_gpu(tmp_path: Path) -> None:
    cold, found = check_artifacts(tmp_path)
    assert found["digest"] == cold["digest"]
