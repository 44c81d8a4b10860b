"""The one place that touches private interfaces of torch.

Checked on torch 2.11.0 (CUDA) and 2.13.0 (CPU). Every use degrades to something slower.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from types import SimpleNamespace
from typing import Any

import torch

from .source import Source

log = logging.getLogger("gems_compile.lowering.private")

NO_PROFILER = SimpleNamespace(_is_profiler_enabled=False)


@contextlib.contextmanager
def known_to_partitioner(
    recomputable: Set[Any], fusible: Set[Any], views: Set[Any]
) -> Iterator[None]:
    """The min-cut partitioner counts these ops (overload packets) among those that cost little to
    recompute, those that fuse with their neighbours, and those that compute nothing."""
    from torch._functorch import partitioners

    try:
        known = partitioners.get_default_op_list
        types = known()
        wider = dataclasses.replace(
            types,
            recomputable_ops=types.recomputable_ops | recomputable | views,
            fusible_ops=types.fusible_ops | recomputable | fusible | views,
            view_ops=types.view_ops | views,
        )
    except (AttributeError, TypeError) as e:
        log.info("the partitioner's lists are not as they were: %s", e)
        yield
        return
    partitioners.get_default_op_list = lambda: wider
    try:
        yield
    finally:
        partitioners.get_default_op_list = known


@functools.cache
def enter_fake_mode_once() -> None:
    """Before a short-lived thread does: in torch 2.11 built for CUDA, where there is no GPU, what
    the first entry sets up dies with its thread, and the next entry crashes."""
    with torch._subclasses.FakeTensorMode():
        pass


def duplicates_are_gone() -> contextlib.AbstractContextManager[None]:
    """The min-cut partitioner looks for no duplicates of its own, for which it imports a hundred of
    Inductor's modules: half a second of a process's first backward."""
    return _with_setting("cse", False)


def backward_at_once() -> contextlib.AbstractContextManager[None]:
    """While a graph is compiled here its backward is, too, and not when it first runs: the kernels
    of both then compile together."""
    return _with_setting("force_non_lazy_backward_lowering", True)


def _with_setting(name: str, value: bool) -> contextlib.AbstractContextManager[None]:
    """A setting of AOTAutograd's, in a torch that has it."""
    from torch._functorch import config

    return config.patch({name: value}) if hasattr(config, name) else contextlib.nullcontext()


def donate_nothing() -> None:
    """Of the graph that AOTAutograd compiles now: no saved tensor is its backward's own to write.

    Otherwise a backward that was compiled before it is known to run once refuses to run with
    ``retain_graph``. Our kernels write no saved tensor.
    """
    context = torch._guards.TracingContext.try_get()
    donated = getattr(getattr(context, "fw_metadata", None), "bw_donated_idxs", None)
    if donated is not None:
        donated.clear()


def forget_dispatch(overload: Any, key: str) -> None:
    """Let torch's Python dispatcher, which is on while it traces, look again for what an overload
    runs at a device's key. It remembers that a kernel was there, and would call one that is gone:
    a segmentation fault where ATen has none at the key itself (torch 2.11 to 2.13)."""
    uncache = getattr(overload, "_uncache_dispatch", None)
    if uncache is not None:
        uncache(getattr(torch._C.DispatchKey, key))


def static_inputs() -> list[int]:
    """Which inputs of the graph that AOTAutograd compiles now are parameters and buffers: the same
    tensors in every call."""
    context = torch._guards.TracingContext.try_get()
    found = getattr(getattr(context, "fw_metadata", None), "static_input_indices", None)
    return list(found or ())


def static_launcher(
    source: Source, record: dict[str, Any], path: str, device: int | None
) -> Callable[..., None]:
    """A launch function (x, y, z, stream, *args) for a compiled binary; tensors as addresses.

    Through torch's statically launched kernels where they exist; else through Triton's JIT.
    Raises torch.OutOfMemoryError where the device has too little for one program of the kernel.
    """
    try:
        from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

        kernel = StaticallyLaunchedCudaKernel(_as_compiled(source, record))
        with _current(device):
            kernel.load_kernel(device or 0)
        return _direct(kernel)
    except torch.OutOfMemoryError:  # more shared memory than the device has: no way of launching
        raise
    except Exception as e:
        _slow_launches(source.name, e)
        return jit_launcher(source, path)


@contextlib.contextmanager
def _current(index: int | None) -> Iterator[None]:
    """The GPU is current in the block, and so is its context, into which the driver loads kernels.

    A graph's first call may come while another GPU is current, or from a thread that made no call
    of CUDA's runtime yet, which has no context.
    """
    if index is None:
        yield
        return
    with torch.cuda.device(index):
        torch.cuda.is_current_stream_capturing()  # a call that is allowed at any time
        yield


def _slow_launches(name: str, why: Exception) -> None:
    """Say once that launches go through Triton's JIT: 12 us and a compile more for each kernel."""
    level = logging.DEBUG if _told else logging.WARNING
    _told.add("launcher")
    log.log(
        level,
        "no static launcher for %s (%s: %s); Triton's own is used",
        name,
        type(why).__name__,
        why,
    )


_told: set[str] = set()


def _as_compiled(source: Source, record: dict[str, Any]) -> Any:
    """What StaticallyLaunchedCudaKernel reads of a Triton CompiledKernel."""
    meta = source.meta
    names = [*meta["signature"], *meta["constants"]]
    signature = {**meta["signature"], **dict.fromkeys(meta["constants"], "constexpr")}
    params = [
        SimpleNamespace(num=k, name=n, is_constexpr=n in meta["constants"])
        for k, n in enumerate(names)
    ]
    # A name of its own for every binary: torch keys loaded modules by it.
    function = SimpleNamespace(__name__=record["name"], arg_names=names, params=params)
    src = SimpleNamespace(
        fn=function,
        signature=signature,
        constants={(names.index(n),): c for n, c in meta["constants"].items()},
    )
    facts = SimpleNamespace(
        num_warps=record["num_warps"], shared=record["shared"], num_ctas=record["num_ctas"]
    )
    for key in ("global_scratch_size", "profile_scratch_size"):
        if record[key] is not None:
            setattr(facts, key, record[key])
    return SimpleNamespace(
        src=src,
        metadata=facts,
        hash=record["hash"],
        shared=record["shared"],
        _cubin_path=record["path"],
        asm={os.path.splitext(record["path"])[1][1:]: b""},  # read from the path when loaded
    )


def _nulls(kernel: Any) -> int:
    """How many addresses of scratch memory it takes behind its own arguments."""
    return int(kernel.has_global_scratch) + int(kernel.has_profile_scratch)


def _direct(kernel: Any) -> Callable[..., None]:
    """The kernel's own C launch with everything constant bound."""
    if torch.version.hip is not None:
        return kernel.run
    scratch = _nulls(kernel)
    types = kernel.arg_tys + "O" * scratch
    launch, function = kernel.C_impl._launch_kernel, kernel.function
    warps, shared, nothing = kernel.num_warps, kernel.shared, (None,) * scratch

    def run(x: int, y: int, z: int, stream: int, *args: Any) -> None:
        launch(function, x, y, z, warps, shared, types, args + nothing, stream)

    run.kernel = kernel  # type: ignore[attr-defined]  # keeps the module loaded
    return run


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A kernel on a device, as the driver launches it. ``nulls``: addresses of scratch memory that
    it takes behind its own arguments and does not use."""

    function: int
    threads: int
    shared: int
    nulls: int


def loaded_kernel(launcher: Callable[..., None]) -> Loaded | None:
    """What ``launcher`` launches; None where only that itself can tell."""
    kernel = getattr(launcher, "kernel", None)
    if kernel is None or not isinstance(kernel.function, int):
        return None
    return Loaded(kernel.function, 32 * kernel.num_warps, kernel.shared, _nulls(kernel))


def address_method() -> Any:
    """``Tensor.data_ptr`` as a method of the class that all tensors are of."""
    return torch._C.TensorBase.data_ptr


def jit_launcher(source: Source, path: str) -> Callable[..., None]:
    from .worker import load_module

    function = getattr(load_module(path), source.meta["name"])
    constants, warps = source.meta["constants"], source.meta["num_warps"]
    dtypes = [None if d is None else getattr(torch, d) for d in source.pointer_dtypes]

    def launch(x: int, y: int, z: int, stream: Any, *args: Any) -> None:
        function[(x, y, z)](
            *(a if d is None else _Pointer(a, d) for a, d in zip(args, dtypes, strict=True)),
            **constants,
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=not source.meta["exact"],
        )

    return launch


class _Pointer:
    """An address with a dtype, which is all that Triton's JIT reads of a tensor."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def largest(size: Any, values: Iterable[Any]) -> int | None:
    """The most that an expression of symbols may be, as far as Dynamo knows and guards; ``values``
    are tensors and numbers of the graph."""
    return _end(size, values, "upper")


def smallest(size: Any, values: Iterable[Any]) -> int | None:
    """The least that it may be."""
    return _end(size, values, "lower")


def _end(size: Any, values: Iterable[Any], which: str) -> int | None:
    for value in values:
        for number in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(number, torch.SymInt):
                try:
                    end = getattr(number.node.shape_env.bound_sympy(size), which)
                    return int(end) if end.is_Integer else None
                except (AttributeError, TypeError, ValueError) as e:
                    log.info("no range of %s is known: %s", size, e)
                    return None
    return None


def allocator(device: torch.device) -> Callable[..., torch.Tensor]:
    """(size, stride, dtype) -> an uninitialised tensor on the device, as cheaply as there is."""
    guards = getattr(torch._C._dynamo, "guards", None)
    quick = getattr(guards, f"_empty_strided_{device.type}", None)
    if quick is not None:
        return quick
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


def reinterpreter() -> Callable[..., torch.Tensor]:
    """(tensor, size, stride, offset from the tensor's own) -> a view, without dispatch."""
    quick = getattr(getattr(torch._C._dynamo, "guards", None), "_reinterpret_tensor", None)
    if quick is not None:
        return quick
    return lambda t, size, stride, offset: t.as_strided(size, stride, t.storage_offset() + offset)


#: bound by torch with the arguments of the ATen op; OpOverloads take 0.7 us more for two arguments,
#: 4 us more for nine
BOUND = (
    *("mm", "bmm", "addmm", "baddbmm", "convolution"),
    *(f"_scaled_dot_product_{kind}_attention" for kind in ("cudnn", "flash", "efficient")),
)


def quick_call(value: Any) -> Any:
    """What does as an OpOverload does, with less in front; other values as they are."""
    if not isinstance(value, torch._ops.OpOverload):
        return value
    namespace, _, name = value._schema.name.partition("::")
    if namespace == "aten" and value._overloadname == "default" and name in BOUND:
        return getattr(torch, name, value)
    return getattr(value, "_op", value)


def looks_at_memory() -> Callable[[int, torch.device, int], torch.UntypedStorage] | None:
    """(address, device, bytes) -> that memory, which stays somebody else's; as torch's trees of
    CUDA graphs look at it. None where this torch has no such function."""
    return getattr(torch._C, "_construct_storage_from_data_pointer", None)


def current_stream(device: int) -> Callable[[], int]:
    if hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return functools.partial(torch._C._cuda_getCurrentRawStream, device)
    return lambda: torch.cuda.current_stream(device).cuda_stream


def profiler() -> Any:
    """What tells by ``_is_profiler_enabled`` whether a profiler is on."""
    module = torch.autograd.profiler
    return module if hasattr(module, "_is_profiler_enabled") else NO_PROFILER


def recompiled() -> tuple[str, Any, tuple[str, ...]] | None:
    """(Compile id, code, why no earlier version of it fits) of the function that Dynamo compiles
    again now; the version that was used last comes first. None where this is its first time."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    frame = getattr(compile_id, "frame_id", None)
    if frame is None or not getattr(compile_id, "frame_compile_id", 0):
        return None
    for code, texts in reversed(list(guard_failures().items())):
        if texts and texts[-1].startswith(f"{frame}/"):
            known, read = _read.get(code, (texts, 0))
            fresh = texts[read if known is texts else 0 :]  # another list: Dynamo was reset
            _read[code] = (texts, len(texts))
            return (str(compile_id), code, _latest(fresh)) if fresh else None
    return None


_read: weakref.WeakKeyDictionary[Any, tuple[list[str], int]] = weakref.WeakKeyDictionary()


def guard_failures() -> dict[Any, list[str]]:
    """Code -> why its compiled versions did not fit: all of the versions, each time."""
    return dict(getattr(torch._dynamo.utils, "guard_failures", {}))


def _latest(texts: Sequence[str]) -> tuple[str, ...]:
    """Those of the last time: none tells of a version twice."""
    found: dict[str, str] = {}
    for text in reversed(texts):
        version, _, why = text.partition(": ")
        if version in found:
            break
        found[version] = why
    return tuple(reversed(found.values()))


def graph_breaks(after: Any = None) -> list[Any]:
    """Those that a graph ended at, behind ``after``, which Dynamo forgets when it is reset: each
    with its ``reason`` and ``user_stack``."""
    found = list(getattr(torch._dynamo.utils, "graph_break_reasons", ()))
    place = next((k for k, b in enumerate(found) if b is after), -1)
    return found[place + 1 :]


def seconds_of_dynamo() -> float | None:
    """Since Dynamo began with the function that it compiles now."""
    known = getattr(torch._dynamo.utils, "get_metrics_context", None)
    began = getattr(known(), "_start_time_ns", 0) if known is not None else 0
    return (time.time_ns() - began) / 1e9 if began else None


def traces() -> bool:
    """Whether TORCH_TRACE asks for artifacts."""
    internal = getattr(torch._logging, "_internal", None)
    handlers = getattr(getattr(internal, "trace_log", None), "handlers", ())
    kind = getattr(internal, "LazyTraceHandler", None)  # which goes where nothing is asked for
    return kind is not None and any(isinstance(handler, kind) for handler in handlers)


def trace(name: str, encoding: str, text: str) -> None:
    """One artifact of the compile that goes on, as tlparse shows it."""
    try:
        torch._logging.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": encoding},
            payload_fn=lambda: text,
        )
    except (AttributeError, TypeError) as e:
        log.info("no artifact is traced: %s", e)


def driver_version() -> int | None:
    """Of CUDA, as the driver has it: 12080."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return ask() if ask is not None and torch.cuda.is_available() else None


def compiled_function(node: Any) -> Any:
    """AOTAutograd's class of an autograd node, None of any other node."""
    cls = getattr(node, "_forward_cls", None)
    return cls if hasattr(cls, "compiled_fw") and hasattr(cls, "metadata") else None


def why_not_plain(node: Any, outputs: int, inputs: int) -> str | None:
    """Why AOTAutograd's function is not the program's: one result for each of ``outputs``, fresh,
    from ``inputs`` that it only reads; None where it is."""
    try:
        metadata = compiled_function(node).metadata
        writes = any(i.mutates_data or i.mutates_metadata for i in metadata.input_info)
        kinds = {o.output_type.name for o in metadata.output_info}
        shared = metadata.num_intermediate_bases > 0
    except AttributeError as unknown:
        return f"this torch keeps other facts about compiled functions ({unknown})"
    if writes:
        return "it writes an input"
    if shared or not kinds <= {"non_alias", "unsafe_view_alias"}:
        return "an output shares memory"
    if len(metadata.output_info) != outputs or len(node.needs_input_grad) != inputs:
        return "its operands were rearranged"
    return None


def backward_keeps_graph() -> bool:
    """Whether the backward pass that runs now was asked to ``retain_graph``."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


def visible_outputs() -> int | None:
    """How many results of the forward graph that AOTAutograd compiles now come before those that it
    saves for the backward; None where that is not known."""
    context = torch._guards.TracingContext.try_get()
    found = getattr(getattr(context, "fw_metadata", None), "num_forward", None)
    return found if isinstance(found, int) else None


def some_size(shapes: Any, name: str, hint: int = 1000003) -> Any:
    """A size that a graph is compiled for whatever it is; ``shapes``: a ShapeEnv. ``hint``: what it
    is for now; by default a prime, which has no property by chance."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = shapes.create_symbol(
        hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
    )
    return shapes.create_symintnode(symbol, hint=hint, source=source)
