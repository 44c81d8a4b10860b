"""Kernels as a large GPU would get them, and what Triton makes of them, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opcheck import options, trace
from torch import Tensor
from torch.fx import GraphModule

from gems_compile.kernels.target import INTERPRETER
from gems_compile.lowering.pipeline import compile_graph
from gems_compile.lowering.source import Source


def sources(
    graph: GraphModule, backend: str = INTERPRETER.backend, arch: int | None = None, **more: Any
) -> list[Source]:
    """The kernels of a graph as a large GPU would get them; nothing is compiled or run."""
    wide = dataclasses.replace(INTERPRETER, multiprocessors=132, backend=backend, arch=arch)
    return compile_graph(graph, [], options(target=wide, **more))[1].sources


def wide_sources(fn: Callable[..., Any], *args: Tensor) -> list[Source]:
    """Those of a function, whose small kernels share launches."""
    return sources(trace(fn, *args), alone=False)


def assembly(source: Source, folder: Path, kind: str = "ptx", arch: int = 90) -> str:
    """A kernel compiled for a GPU of NVIDIA's, without one, as one of Triton's texts.

    In a process of its own: here Triton is its interpreter. ``folder``: for its files.
    """
    code = (
        "import json, sys\n"
        "from gems_compile.lowering import worker\n"
        "import triton\n"
        "real = triton.compile\n"
        "def keep(*a, **k):\n"
        "    kernel = real(*a, **k)\n"
        "    print(kernel.asm[sys.argv[3]])\n"
        "    return kernel\n"
        "triton.compile = keep\n"
        "target = ['cuda', int(sys.argv[4]), 32]\n"
        "worker.compile_file(sys.argv[1], json.loads(sys.argv[2]), target)\n"
    )
    path = folder / f"{source.name}.py"
    path.write_text(source.text)
    run = [sys.executable, "-c", code, str(path), json.dumps(source.meta), kind, str(arch)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(run, check=True, env=env, timeout=300, capture_output=True, text=True)
    return done.stdout
