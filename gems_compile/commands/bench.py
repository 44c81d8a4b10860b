"""``python -m gems_compile bench``: the benchmarks, where the repository is there."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import unknown
from ..tables import Table, show

WHERE = (
    "The benchmarks are in the repository of gems-compile and in no wheel: take a checkout of it, "
    "run pip install -e '.[bench]' there, and call this again."
)


def main(name: str | None, args: Sequence[str], as_json: bool) -> int:
    """List them, or run one; its exit code, where that is 0 or 2, else 1."""
    root = repository()
    if root is None:
        print(WHERE, file=sys.stderr)
        return 2
    found = benchmarks(root)
    if name is None:
        return _list(found, as_json)
    if name not in found:
        print(unknown("benchmark", name, found), file=sys.stderr)
        return 2
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *args], cwd=root)
    return done.returncode if done.returncode in (0, 2) else 1


def _list(found: dict[str, str], as_json: bool) -> int:
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    rows: list[Sequence[Any]] = list(found.items())
    last = "gems bench NAME --help tells of one's options; it runs in the repository's folder."
    show([Table("Benchmarks", ("", ""), rows), last])
    return 0


def repository() -> str | None:
    """The folder of the repository that this package is a part of, where there is one."""
    root = str(Path(__file__).resolve().parents[2])
    beside = ("benchmarks/__init__.py", "lowering/__init__.py", "pyproject.toml")
    return root if all(os.path.isfile(os.path.join(root, file)) for file in beside) else None


def benchmarks(root: str) -> dict[str, str]:
    """Name -> what it measures, in a line, of those that are programs of their own."""
    folder, found = os.path.join(root, "benchmarks"), {}
    for file in sorted(os.listdir(folder)):
        name, kind = os.path.splitext(file)
        if kind == ".py":
            with open(os.path.join(folder, file), encoding="utf-8") as source:
                about = ast.get_docstring(ast.parse(source.read())) or ""
            if f"python -m benchmarks.{name}" in about:
                found[name] = _first_sentence(about)
    return found


def _first_sentence(about: str) -> str:
    """``Time whole models``, of "Time whole models: ``python -m benchmarks.models ...``."."""
    first = " ".join(about.split("\n\n")[0].split())
    first = re.sub(r"^``python -m [^`]*``: |(?:: |, )?``python -m [^`]*``", "", first)
    return re.split(r"[.](?: |$)", first)[0].strip(" .,")
