"""How the native launcher is built, kept and found, and what there is without it."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import gems_only
from test_native import extension, launch, needs_compiler

from gems_compile.lowering import native
from gems_compile.lowering.runs import Run

pytestmark = gems_only


@pytest.fixture
def fresh(monkeypatch, tmp_path: Path) -> Path:
    """No extension was begun in this process, and none is kept in the folder."""
    monkeypatch.setattr(native, "_current", None)
    return tmp_path / "cache"


def library(folder: Path) -> Path:
    (found,) = (folder / "native").iterdir()
    return found


@needs_compiler
def test_it_is_built_once(fresh: Path, monkeypatch) -> None:
    assert native.start(str(fresh)).wait().run is not None
    assert native.is_whole(str(library(fresh)))
    monkeypatch.setattr(native, "_current", None)
    monkeypatch.setattr(native, "build", None)
    assert native.start(str(fresh)).wait().run is not None
    assert native.start(str(fresh)) is native.start(str(fresh))


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"no library", "half", "flip"])
def test_a_damaged_library_is_built_anew(fresh: Path, monkeypatch, damage) -> None:
    native.start(str(fresh)).wait()
    path = library(fresh)
    whole = path.read_bytes()
    damaged = {
        "half": whole[: len(whole) // 2],
        "flip": whole[:1000] + bytes([255 - whole[1000]]) + whole[1001:],
    }.get(damage, damage)
    path.unlink()  # this process has it in memory
    path.write_bytes(damaged)
    monkeypatch.setattr(native, "_current", None)
    assert native.start(str(fresh)).wait().run is not None
    assert path.read_bytes() == whole or native.is_whole(str(path))


@needs_compiler
def test_one_from_another_machine_is_built_anew(fresh: Path, monkeypatch) -> None:
    """Whole, and yet it cannot be loaded here."""
    native.start(str(fresh)).wait()
    path = library(fresh)
    path.unlink()
    path.write_bytes(native._signed(b"\x7fELF of another kind"))
    monkeypatch.setattr(native, "_current", None)
    assert native.start(str(fresh)).wait().run is not None


@pytest.mark.parametrize("why", ["none", "gone", "fails", "headers"])
def test_without_a_compiler_python_launches(fresh: Path, monkeypatch, caplog, why) -> None:
    caplog.set_level("INFO", logger="gems_compile.lowering.native")
    monkeypatch.delenv("CC", raising=False)
    if why == "none":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        reason = "there is no C compiler"
    elif why == "gone":
        monkeypatch.setenv("CC", "/nowhere/gcc -m64")
        reason = "the C compiler /nowhere/gcc is not there"
    elif why == "fails":
        monkeypatch.setenv("CC", "/bin/false")
        reason = "/bin/false failed"
    else:
        paths = native.sysconfig.get_paths()
        monkeypatch.setattr(
            native.sysconfig, "get_paths", lambda **_: {**paths, "include": "/nowhere"}
        )
        if not native.shutil.which("gcc"):
            monkeypatch.setenv("CC", "/bin/true")
        reason = "Python's headers are not installed"
    found = native.start(str(fresh)).wait()
    assert found.run is None and reason in found.why
    assert [r.getMessage() for r in caplog.records] == [
        f"kernels are launched from Python: {found.why}"
    ]
    target = SimpleNamespace(name="cuda", backend="cuda")
    assert reason in native.in_use(target, str(fresh))
    run = Run("r0", [launch()])
    assert native.launcher(run, {"k0": print}, torch.device("cuda", 0)) is None


@needs_compiler
def test_what_the_doctor_says(fresh: Path) -> None:
    cuda = SimpleNamespace(name="cuda", backend="cuda")
    hip = SimpleNamespace(name="hip", backend="hip")
    assert native.in_use(cuda, str(fresh)) == f"native ({library(fresh)})"
    assert native.in_use(hip, None) == "from Python, kernel by kernel (on hip)"
    assert native.in_use(None, None) == "none: no kernel runs on a GPU"


@needs_compiler
def test_a_folder_that_cannot_be_written(fresh: Path) -> None:
    fresh.write_text("a file")
    found = native.start(str(fresh)).wait()
    assert found.run is not None and not found.path.startswith(str(fresh))


BUILD = """
import sys
from gems_compile.lowering import native
found = native.start(sys.argv[1]).wait()
assert found.run is not None, found.why
"""


@needs_compiler
@pytest.mark.slow
def test_processes_build_at_once(fresh: Path) -> None:
    command = [sys.executable, "-c", BUILD, str(fresh)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert native.is_whole(str(library(fresh)))


def _in_a_child(queue) -> None:
    queue.put(native.start(None).wait().run is not None)


@needs_compiler
def test_a_forked_process_has_it_too() -> None:
    extension()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    child.join(60)
    assert queue.get()
