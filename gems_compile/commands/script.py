"""``python -m gems_compile explain SCRIPT ...``: the script runs as it is, and what it compiled
with ``backend="gems"`` is explained when it ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from ..backend import Gems, gems
from ..dynamo import Recompile, Watch
from ..errors import nearest
from ..explain import Explanation
from ..lowering.report import Report
from ..tables import show

GOOD, FAILED, MISTAKE = 0, 1, 2
NOTHING = (
    'It compiled nothing with torch.compile(..., backend="gems"). With --backend gems, before the '
    "script's name, what names no backend, or inductor, is compiled by gems."
)


def main(
    script: str,
    args: Sequence[str],
    backend: str | None,
    as_json: bool,
    html: str | None,
    why: str | None,
) -> int:
    """Run it and print what became of it; the exit code is 1 where the script failed."""
    problem = _why_not_there(script) or _why_no_folder(html)
    if problem is not None:
        print(problem, file=sys.stderr)
        return MISTAKE
    with contextlib.ExitStack() as stack:
        if as_json:  # what the script prints is no part of it
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if backend is not None:
            stack.enter_context(default_backend(backend))
        explanation, passed = explain_script(script, args)
    sys.stdout.flush()
    _print(explanation, as_json, why)
    if html is not None:
        explanation.to_html(html)
        print(f"The page is {os.path.abspath(html)}", file=sys.stderr)
    return GOOD if passed else FAILED


def _print(explanation: Explanation, as_json: bool, why: str | None) -> None:
    facts = None if why is None else explanation.why(why)
    if as_json:
        print(explanation.to_json() if facts is None else json.dumps(facts, indent=1))
    elif facts is not None:
        print("\n".join(facts) if facts else f"No fact holds {why!r}.")
    else:
        print()
        show(
            explanation.blocks()
            if explanation.graphs or explanation.target == "none"
            else [NOTHING]
        )


def _why_not_there(script: str) -> str | None:
    if os.path.exists(script):
        return None
    folder, name = os.path.split(script)
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = nearest(name, [file for file in beside if file.endswith(".py")])
    return f"there is no script {script}{near}"


def _why_no_folder(html: str | None) -> str | None:
    if html is None:
        return None
    folder = os.path.dirname(os.path.abspath(html))
    return None if os.path.isdir(folder) else f"--html {html}: there is no folder {folder}"


# running it --------------------------------------------------------------------------------------


def explain_script(script: str, args: Sequence[str] = ()) -> tuple[Explanation, bool]:
    """What became of all that a script compiles, and whether the script ended well."""
    kept, watch = Kept(gems), Watch()
    with watch, kept.watching(watch):
        passed = run(script, args)
    return Explanation.of(kept, os.path.basename(script), watch), passed


def run(script: str, args: Sequence[str]) -> bool:
    """As ``python script args`` would; whether it ended well. An exception is printed."""
    argv, path = list(sys.argv), list(sys.path)
    sys.argv = [script, *args]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code is None or end.code == 0
    except BaseException as error:
        traceback.print_exception(type(error), error, _of_the_script(error, script))
        return False
    finally:
        sys.argv, sys.path[:] = argv, path
    return True


def _of_the_script(error: BaseException, script: str) -> TracebackType | None:
    """The traceback from the script's first frame on; whole where it never began."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    return trace or error.__traceback__


class Kept:
    """The reports of a backend, with those that it forgets when Dynamo is reset."""

    def __init__(self, backend: Gems) -> None:
        self.backend = backend
        self.reports: list[Report] = []
        self.recompiles: list[Recompile] = []
        self.first = 0  # number of the first graph since the last reset
        self.taken = (0, 0)

    @contextlib.contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Meanwhile no graph comes from the cache of whole graphs, whose reports tell less."""

        def look() -> None:
            watch.at.look()
            self.look()

        before, self.backend.fresh = self.backend.fresh, True
        self.taken = len(self.backend.reports), len(self.backend.recompiles)
        self.backend.watchers.append(look)
        try:
            yield
        finally:
            self.backend.watchers.remove(look)
            self.backend.fresh = before
            self.look()

    def look(self) -> None:
        """Take what is new; graphs are numbered on where the backend begins anew."""
        found = len(self.backend.reports), len(self.backend.recompiles)
        if found[0] < self.taken[0]:
            self.first = 1 + max((r.graph for r in self.reports), default=-1)
            self.taken = 0, 0
        for report in self.backend.reports[self.taken[0] :]:
            report.graph += self.first
            self.reports.append(report)
        for again in self.backend.recompiles[self.taken[1] :]:
            self.recompiles.append(replace(again, graph=again.graph + self.first))
        self.taken = found


@contextlib.contextmanager
def default_backend(name: str) -> Iterator[None]:
    """``torch.compile`` takes this backend where it is given none, or inductor."""
    real: Any = torch.compile
    set_default = getattr(torch.compiler, "set_default_backend", None)  # torch 2.11 has none

    @functools.wraps(real)
    def compile(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") in (None, "inductor"):
            kwargs["backend"] = name
        return real(*args, **kwargs)

    if set_default is not None:
        set_default(name)
    torch.compile = compile
    try:
        yield
    finally:
        torch.compile = real
        if set_default is not None:
            set_default(None)
