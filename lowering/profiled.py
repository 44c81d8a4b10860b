"""What a profiler sees of a graph: a range for the call, and one for every kernel's launch.

Ranges cost about a microsecond each, so they are in a second form of the function, which is made
and run while a profiler is on: launches come one by one from Python there. ``torch.profiler``,
``emit_nvtx`` and ``emit_itt`` all show them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch

from .private import NO_PROFILER
from .runs import Run, in_python, wide_forms


def profiled(
    code: CodeType,
    scope: Mapping[str, Any],
    runs: Sequence[Run],
    kernels: Mapping[str, Callable[..., None]],
) -> Callable[[list[Any]], Any]:
    """The function ``code`` defines in ``scope``, with ranges."""
    label = code.co_filename.strip("<>")

    @functools.cache
    def made() -> Callable[[list[Any]], Any]:
        shown = {name: _ranged(kernel, _name(name, runs)) for name, kernel in kernels.items()}
        launches = {**in_python(runs, shown), **wide_forms(runs, shown)}
        within: dict[str, Any] = {**scope, **launches, "profiler": NO_PROFILER}
        exec(code, within)
        call: Callable[[list[Any]], Any] = within["call"]
        return call

    def called(args: list[Any]) -> Any:
        with torch.profiler.record_function(label):
            return made()(args)

    return called


def _name(kernel: str, runs: Sequence[Run]) -> str:
    """A kernel's readable name."""
    launches = (launch for run in runs for launch in run.launches)
    return next((x.name for x in launches if kernel in (x.kernel, f"{x.kernel}w")), kernel)


def _ranged(kernel: Callable[..., None], name: str) -> Callable[..., None]:
    def launch(*args: Any) -> None:
        with torch.profiler.record_function(name):
            kernel(*args)

    return launch
