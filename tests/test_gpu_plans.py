"""Graphs as torch traces them for a GPU are planned without a failure, also where there is none.

A graph that fails runs as ATen, with a warning: right, and slow. A batch norm, say, is traced into
other ops for a CUDA device, and no test on a CPU would see what becomes of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent


def why_no_pretence() -> str:
    """Why nothing can stand for a GPU here."""
    if torch.backends.cuda.is_built():
        return "a build with CUDA has a device of its own"
    if shutil.which("g++") is None:
        return "needs a C++ compiler"
    return "" if (TORCH / "include" / "ATen").is_dir() else "needs torch's headers"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a process which has a GPU, or what stands for one."""
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    if torch.cuda.is_available():
        return env
    if why := why_no_pretence():
        pytest.skip(why)
    made = tmp_path_factory.mktemp("gpu") / "pretended_gpu.so"
    places = [f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", HERE / "pretended_gpu.cpp"]
    done = subprocess.run([*command, "-o", made, *places], capture_output=True, text=True)
    if done.returncode:  # what torch asks of a device changes from version to version
        pytest.skip(f"this torch asks for something else: {done.stderr[-300:]}")
    before = [TORCH / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    loaded = ":".join(map(str, [*before, made]))
    return {**env, "LD_PRELOAD": loaded, "LD_LIBRARY_PATH": str(TORCH / "lib")}


def test_every_graph_is_planned(environment: dict[str, str]) -> None:
    program = [sys.executable, HERE / "plan_for_a_gpu.py"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 5, done.stdout
    for row in rows:
        assert not row["error"], row
        kinds = [graph["kind"] for graph in row["graphs"]]
        assert kinds == (["inference"] if "," in row["model"] else ["forward", "backward"])
        for graph in row["graphs"]:
            assert not graph["failures"] and graph["launches"] > 2, row
