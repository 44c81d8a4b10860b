"""The kernel cache on disk: what goes when it is too large, and the command about it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gems_compile import __main__ as command
from gems_compile.lowering import shelf


def put(folder: Path, key: str, size: int, days: float, digest: str = "d") -> None:
    """A kernel of ``size`` bytes that was used some days ago."""
    place = folder / "kernels" / "nvidia-90" / digest
    place.mkdir(parents=True, exist_ok=True)
    used = time.time() - days * shelf.DAY_S
    for end, share in ((".py", 0.25), (".json", 0.25), (".cubin", 0.5)):
        path = place / f"{key}{end}"
        path.write_bytes(bytes(int(size * share)))
        os.utime(path, (used, used))


def left(folder: Path) -> set[str]:
    return {path.stem for path in folder.rglob("*.*")} - {shelf.STAMP}


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path: Path) -> None:
    for days, key in enumerate("abcde"):
        put(tmp_path, key, 1000, days + 0.5)
    assert shelf.sweep(tmp_path, 5000) == 0
    assert shelf.sweep(tmp_path, 4999) == 2000  # down to 0.8 of it
    assert left(tmp_path) == {"a", "b", "c"}
    assert shelf.sweep(tmp_path, 100) == 2000
    assert left(tmp_path) == {"a"}  # somebody may just have looked it up


def test_leftovers_of_killed_processes_go_too(tmp_path: Path) -> None:
    put(tmp_path, "a", 1000, 3)
    (rest,) = tmp_path.rglob("*.cubin")
    rest.rename(f"{rest}.0123456789abcdef")
    assert shelf.sweep(tmp_path, 0) == 1000 and not left(tmp_path)


def test_there_may_be_nothing(tmp_path: Path) -> None:
    assert shelf.kernels(str(tmp_path / "no")) == []
    assert shelf.sweep(str(tmp_path / "no"), 0) == 0
    (tmp_path / "kernels").write_text("a file")
    assert shelf.kernels(str(tmp_path)) == []


def test_it_looks_once_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_begun", set())
    put(tmp_path, "a", 1000, 3)
    thread = shelf.sweep_now_and_then(str(tmp_path), 0)
    assert thread is not None
    thread.join()
    assert not left(tmp_path)
    assert shelf.sweep_now_and_then(str(tmp_path), 0) is None
    monkeypatch.setattr(shelf, "_begun", set())  # another process
    assert shelf.sweep_now_and_then(str(tmp_path), 0) is None
    monkeypatch.setattr(shelf, "_begun", set())
    os.utime(tmp_path / "kernels" / shelf.STAMP, (0, 0))
    assert shelf.sweep_now_and_then(str(tmp_path), 0) is not None


def test_use_is_noted(tmp_path: Path) -> None:
    put(tmp_path, "a", 1000, 3)
    (path,) = tmp_path.rglob("*.cubin")
    shelf.touch(str(path), path.stat().st_mtime)
    (kernel,) = shelf.kernels(str(tmp_path))
    assert time.time() - kernel.used < 60
    shelf.touch(str(tmp_path / "gone"), 0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ours, torchs = tmp_path / "gems", tmp_path / "torch"
    ours.mkdir(mode=0o700)
    monkeypatch.setenv("GEMS_CACHE_DIR", str(ours))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(torchs))
    put(ours, "a", 1000, 0)
    put(ours, "b", 2000, 0, "older")
    graph, other = (torchs / "aotautograd" / key / "entry" for key in "xy")
    for path, text in ((graph, b"... gems_compile.warm Graph"), (other, b"CompiledFxGraph")):
        path.parent.mkdir(parents=True)
        path.write_bytes(text)

    def told(*more: str) -> list[tuple[str, int, int]]:
        assert command.main(["cache", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return sorted((line["what"], line["count"], line["bytes"]) for line in found)

    everything = [
        ("kernels, nvidia-90", 1, 1000),
        ("kernels, nvidia-90", 1, 2000),
        ("whole graphs", 1, 27),
    ]
    assert told() == everything
    assert command.main(["cache"]) == 0
    assert "whole graphs" in capsys.readouterr().out
    assert told("--clear") == everything
    assert told() == [] and not graph.exists() and other.exists()
    assert command.main(["cache"]) == 0
    assert "The caches are empty." in capsys.readouterr().out
