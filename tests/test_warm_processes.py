"""A second process traces the program, and nothing else of a compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import gems_only

pytestmark = gems_only
PROGRAM = Path(__file__).parent / "warm_program.py"


def environment(folder: Path) -> dict[str, str]:
    caches = {name: str(folder / name) for name in ("GEMS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    return {**os.environ, **caches, "GEMS_CACHE": "1"}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.Popen(command, env=environment(folder), stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    return told(start(folder, *arguments))


def assert_warm(found: dict[str, Any], cold: dict[str, Any]) -> None:
    assert found["digest"] == cold["digest"]
    assert found["cache"] == ["from the cache"]
    assert found["stages"] == ["bind", "load", "triton"]  # no pass, no fusion, no code
    assert not [name for name in found["torch"] if "trace" in name or "dispatcher" in name]
    assert found["counters"]["autograd_cache_hit"] == 1
    assert not found["loaded"]


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_a_second_process_is_warm(tmp_path: Path, kind: str) -> None:
    cold = run(tmp_path, kind)
    assert cold["cache"] == ["kept"] and "emit" in cold["stages"] and len(cold["loaded"]) == 2
    assert any("dispatcher" in name for name in cold["torch"])
    assert not cold["inductor"]
    assert_warm(run(tmp_path, kind), cold)


def test_artifacts_carry_the_graphs(tmp_path: Path) -> None:
    """From a process that was warm itself, to a machine that has nothing but the artifacts."""
    file = tmp_path / "artifacts"
    cold = run(tmp_path / "one", "train")
    assert_warm(run(tmp_path / "one", "train", "", str(file)), cold)
    assert_warm(run(tmp_path / "two", "train", str(file)), cold)


def test_processes_at_once(tmp_path: Path) -> None:
    many = [start(tmp_path, "infer") for _ in range(3)]
    found = [told(process) for process in many]
    assert len({one["digest"] for one in found}) == 1
    assert {what for one in found for what in one["cache"]} <= {"kept", "from the cache"}
    assert_warm(run(tmp_path, "infer"), found[0])


ROUNDS = """
import torch
x = torch.linspace(-3, 3, 1001, device="cuda" if torch.cuda.is_available() else "cpu")
run = torch.compile(lambda x: (x * 1.37).bfloat16(), backend="gems")
assert torch.equal(run(x), (x * 1.37).bfloat16())
"""


def test_the_interpreter_is_repaired_in_any_process(tmp_path: Path) -> None:
    """Triton's own rounds to bfloat16 by cutting bits off; tests repair theirs."""
    for _ in ("cold", "warm"):
        subprocess.run([sys.executable, "-c", ROUNDS], env=environment(tmp_path), check=True)
