"""A wrapper's text as a function: compiled, with its kernels and what it calls put in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch

from . import cuda_graphs, native, private
from .copies import once, span_of
from .cut import Captures
from .kept import kept_in_channels_last
from .profiled import profiled
from .runs import Run, in_python, wide_forms
from .seeds import drawer


class Watch(Protocol):
    """What stands between a function and its launches."""

    def kernels(self, kernels: Mapping[str, Callable[..., None]]) -> dict[str, Any]:
        """What is launched in their place."""
        ...

    def call(self, call: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """What is called in the function's place."""
        ...


def settle(tensor: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The tensor with the strides and the alignment that kernels were compiled for."""
    if tensor.stride() == stride and not tensor.data_ptr() & 15:
        return tensor
    if any(s > 1 and a != b for s, a, b in zip(tensor.shape, tensor.stride(), stride, strict=True)):
        out = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
        once(out).copy_(once(tensor, stride))
        return out
    return tensor if not tensor.data_ptr() & 15 else aligned(tensor)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its data does not start on a 16-byte boundary."""
    if not tensor.data_ptr() & 15:
        return tensor
    out = torch.empty(span_of(tensor), dtype=tensor.dtype, device=tensor.device)
    out = out.as_strided(tensor.shape, tensor.stride())
    once(out).copy_(once(tensor))
    return out


def input_view(
    tensor: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> torch.Tensor:
    """A view as ATen makes it, with ``_base`` set."""
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def bind(
    code: CodeType,
    device: torch.device,
    constants: Mapping[str, Any],
    runs: Sequence[Run],
    kernels: Mapping[str, Callable[..., None]],
    captures: Captures | None = None,
    watch: Watch | None = None,
) -> Callable[[list[Any]], Any]:
    """The function, in the boxed form AOTAutograd asks for. ``kernels`` are what launches each
    kernel that the runs name, in both widths. ``watch`` sees every call and every launch."""
    scope = dict(constants)
    called = [name for name in constants if name.startswith("f")]  # not what calls are given
    scope.update((name, private.quick_call(constants[name])) for name in called)
    if watch is None:
        bound = bound_runs(device, runs, kernels)
    else:  # one by one
        kernels = watch.kernels(kernels)
        bound = {**in_python(runs, kernels), **wide_forms(runs, kernels)}
    scope.update(bound)
    scope.update(
        empty=private.allocator(device),
        view=private.reinterpreter(),
        aligned=aligned,
        input_view=input_view,
        kept=kept_in_channels_last,
        seed=drawer(device),
        settle=settle,
        math=math,  # these are sympy's and torch's names, in texts of sizes
        torch=torch,
        Max=max,
        Min=min,
        Mod=operator.mod,
        FloorDiv=operator.floordiv,
    )
    if device.type == "cuda":
        scope["current_stream"] = private.current_stream(device.index or 0)
    if captures is not None and captures.pieces:
        exec(code, scope)
        made = partial(_with_globals, code, scope, runs, kernels)
        return _boxed(cuda_graphs.in_turn(captures, device, scope, made), device)
    scope.update(profiler=private.profiler(), profiled=profiled(code, dict(scope), runs, kernels))
    exec(code, scope)
    call = scope["call"]
    return _boxed(call if watch is None else watch.call(call), device)


def _with_globals(
    code: CodeType,
    scope: dict[str, Any],
    runs: Sequence[Run],
    kernels: Mapping[str, Callable[..., None]],
    more: dict[str, Any],
) -> Callable[..., Any]:
    """The function with globals of its own: what a graph records lives as long as something may
    run it, so nothing that runs it may be reached from there."""
    own = {**scope, **more}
    own.update(profiler=private.profiler(), profiled=profiled(code, dict(own), runs, kernels))
    return FunctionType(scope["call"].__code__, own)


def bound_runs(
    device: torch.device, runs: Sequence[Run], kernels: Mapping[str, Callable[..., None]]
) -> dict[str, Callable[..., None]]:
    """What launches each run: natively where that is possible."""
    natively = {run.name: native.launcher(run, kernels, device) for run in runs}
    found = {name: launch for name, launch in natively.items() if launch is not None}
    others = [run for run in runs if run.name not in found]
    if others:
        found.update(in_python(others, kernels))
    return {**found, **wide_forms(runs, kernels)}


def _boxed(call: Callable[..., Any], device: torch.device) -> Callable[[list[Any]], Any]:
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        call._boxed_call = True  # type: ignore[attr-defined]
        return call
    index = device.index or 0

    def guarded(args: list[Any]) -> Any:
        if torch.cuda.current_device() == index:
            return call(args)
        with torch.cuda.device(index):
            return call(args)

    guarded._boxed_call = True  # type: ignore[attr-defined]
    return guarded
