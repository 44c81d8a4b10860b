"""One ATen overload in eager mode: the compiler with a graph of one node.

A ``Handler`` is what the dispatcher calls instead of ATen's kernel. It describes the call (dtypes,
shapes, strides, alignment, numbers), looks the description up, and runs the kernel compiled for it;
a description met for the first time is compiled. Whatever has no kernel goes to ATen's own.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from . import attention
from .aten_kernel import native_kernel, with_numbers_as_tensors
from .attention import ATTENTION
from .bags import BAGS, KEPT
from .composed import composed_graph, told
from .config import Config, cache_dir
from .convolutions import PRODUCTS, convolution_graph, is_convolution
from .counting import SIZED
from .forms import Form, places, share_memory
from .kernels.composed import UPDATING
from .kernels.dropout import drawing_from, source
from .kernels.op import OPS
from .kernels.target import Target
from .lists import MAX_NUMBERS, count_versions, takes_numbers
from .lists import RULES as LISTS
from .long_scans import LONG_SCANS
from .lowering import native
from .lowering.foreach import single_op
from .lowering.overload import name_of
from .lowering.private import enter_fake_mode_once, forget_dispatch
from .one_node import OneCall, one_node_graph
from .operands import layout_of, takes_lazily_negated, why_native
from .rules import ON_HOST
from .sized import Steps, program
from .whole import Whole
from .worth import least_elements, why_not_worth

log = logging.getLogger(__name__)

#: Kernels compiled for one overload. A workload whose shapes never repeat would compile for ever.
MAX_COMPILED = 256
#: Descriptions remembered for one overload; most of them say "ATen".
MAX_VARIANTS = 4096

SEED = "gems.seed.default"
NUMBERS = (bool, int, float, complex)
PLAIN = (Tensor, Parameter)


class Watcher(Protocol):
    """Told of every call that one of our kernels served."""

    def saw(self, name: str) -> None: ...


class _Here(threading.local):
    off = False  # whether this thread is inside our own code, whose calls are ATen's


_here = _Here()


class Variant:
    """What becomes of calls of one description: ``run`` serves them, or ATen does, for ``why``."""

    __slots__ = ("calls", "layouts", "run", "single", "why")

    def __init__(
        self,
        run: Callable[[list[Any]], Any] | None,
        single: bool,
        why: str = "",
        layouts: Sequence[Any] | None = (),
    ) -> None:
        self.run, self.single, self.why = run, single, why
        self.layouts = layouts  # of its results, see layout_of; None: sizes are data
        self.calls = 0


class Handler:
    """Stands in for ``overload`` at the target's dispatch key; ``form`` tells what it writes."""

    def __init__(
        self, overload: torch._ops.OpOverload, target: Target, form: Form | None = None
    ) -> None:
        self.overload, self.target, self.form = overload, target, form
        self.name = aten_name(overload)
        self.variants: dict[Any, Variant] = {}
        self.watchers: tuple[Watcher, ...] = ()
        self.least: int | None = None  # see ``be_picky``
        self.left = 0  # calls that were ATen's, whatever became of others of their kind
        self._native: Any = None
        self._describe = describe
        self._lock = threading.Lock()
        self._compiled = 0
        # attention draws nothing: with dropout it is ATen's
        random = torch.Tag.nondeterministic_seeded in overload.tags and overload not in ATTENTION
        self._random = random
        self._makes = any(a.name == "device" for a in _arguments(overload))  # what no operand tells
        self._lazy = takes_lazily_negated(overload)
        self._full = Variant(None, False, f"more than {MAX_COMPILED} variants were compiled")
        # A thread may have looked our kernel up and wait for the GIL while another one unregisters
        # it; the dispatcher would free it under that call.
        self._kept: deque[Any] = deque(maxlen=16)
        self._tells = bool(overload._schema.returns)  # ``_foreach_add_`` returns nothing
        self._numbers: Counter[Any] | None = Counter() if takes_numbers(overload) else None
        takes_tensor = [str(a.type) in ("Tensor", "Optional[Tensor]") for a in _arguments(overload)]
        self._tensor_places = [k for k, yes in enumerate(takes_tensor) if yes]
        self._tensor_names = [_arguments(overload)[k].name for k in self._tensor_places]

    # registration --------------------------------------------------------------------------------

    def register(self) -> torch.library.Library:
        """Put this handler at the device key, until ``unregister`` is given what this returns."""
        key = self.target.dispatch_key
        self._native = native_kernel(self.overload, key)
        library = torch.library.Library("aten", "IMPL")
        library.impl(self.name, self, key, with_keyset=True)
        self._kept.append(native_kernel(self.overload, key))
        forget_dispatch(self.overload, key)
        return library

    def unregister(self, library: torch.library.Library) -> None:
        """Restore ATen's kernel."""
        library._destroy()
        forget_dispatch(self.overload, self.target.dispatch_key)

    def be_picky(self, picky: bool) -> None:
        """Serve only calls that measured faster than ATen's."""
        self.least = least_elements(self.name, self.target) if picky else None

    def counts(self) -> dict[str, int]:
        """``ours`` and ``native`` calls so far, and ``compiled`` variants."""
        variants = [*list(self.variants.values()), self._full]
        return {
            "ours": sum(v.calls for v in variants if v.run is not None),
            "native": sum(v.calls for v in variants if v.run is None) + self.left,
            "compiled": sum(v.run is not None for v in variants),
        }

    # a call --------------------------------------------------------------------------------------

    def __call__(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if _here.off:
            return self._aten(keyset, args, kwargs)
        if self._random and (generator := kwargs.get("generator")) is not None:
            if generator.device.type != self.target.device:  # ATen has the error for it
                return self._aten(keyset, args, kwargs)
            with drawing_from(generator):  # kernels are the same whichever it is
                return self(keyset, *args, **{**kwargs, "generator": None})
        if self.least:
            first = args[0] if args else None  # a factory's is a size
            if not isinstance(first, Tensor) or first.numel() < self.least:
                self.left += 1  # looking closer would cost more than it
                return self._aten(keyset, args, kwargs)
        parts: list[Any] = [self.least, *kwargs]
        if self._makes:
            parts += (torch.get_default_dtype(), self._current_device())
        tensors: list[Tensor] = []
        described = self._describe(args, parts, tensors)
        if kwargs and described:
            described = self._describe(kwargs.values(), parts, tensors)
        if not described:
            return self._aten(keyset, args, kwargs)
        written = () if self.form is None else places(self.form, args, kwargs)
        if written and share_memory(written, tensors):
            return self._aten(keyset, args, kwargs)
        if self._lazy and any(t.is_neg() for t in tensors):  # whose memory holds other numbers
            return self._aten(keyset, args, kwargs)
        key = tuple(parts)
        variant = self.variants.get(key)
        if variant is None:
            variant = self._new_variant(key, keyset, args, kwargs, tensors)
        variant.calls += 1
        run = variant.run
        if run is None:
            return self._aten(keyset, args, kwargs)
        _here.off = True
        try:
            out = run(tensors)
        except Exception as error:
            self._give_up(variant, error)
        else:
            if out is not NotImplemented:
                for watcher in self.watchers:
                    watcher.saw(self.name)
                if self.form is not None and not self._tells:
                    return count_versions(self.form, written)
                if written:
                    out = written
                return out[0] if variant.single else out
            variant.calls -= 1
            self.left += 1
        finally:
            _here.off = False
        return self._aten(keyset, args, kwargs)

    def _current_device(self) -> int:
        """What ``device="cuda"`` means now."""
        return torch.cuda.current_device() if self.target.device == "cuda" else -1

    def _aten(self, keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """ATen's kernel. The dispatcher gave us ``x + 2``'s wrapped number as a Python number."""
        native = self._native
        if self._random and source.generator is not None and "generator" in kwargs:
            kwargs = {**kwargs, "generator": source.generator}
        if not self._has_number(args, kwargs):
            return native.call_boxed(keyset, *args, **kwargs)
        return with_numbers_as_tensors(lambda: native.call_boxed(keyset, *args, **kwargs))

    def _has_number(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        given = len(args)
        for k in self._tensor_places:  # a loop: any() would cost a microsecond more
            if k < given and type(args[k]) in NUMBERS:
                return True
        return bool(kwargs) and any(type(kwargs.get(n)) in NUMBERS for n in self._tensor_names)

    # the first call of a kind --------------------------------------------------------------------

    def _new_variant(
        self,
        key: Any,
        keyset: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
    ) -> Variant:
        if self.target.device == "cuda" and torch.cuda.is_current_stream_capturing():
            return Variant(None, False, "a CUDA graph is being captured: no module can be loaded")
        with self._lock:
            if key in self.variants:
                return self.variants[key]
            if len(self.variants) >= MAX_VARIANTS:
                return self._full
            why = self._why_native(tensors, kwargs)
            if not tensors and self._tensor_places:
                why = "its operands are numbers"
            if why is None and self.least is not None:
                why = why_not_worth(self.name, args, self.target)
            if why is None and self._compiled >= MAX_COMPILED:
                return self._full
            if why is None and self._numbers is not None:
                why = self._why_numbers(tensors)
            variant = Variant(None, False, why) if why else self._compile(args, kwargs)
            if variant.run is not None and not self._random and self.form is None:
                self._check_layouts(variant, keyset, args, kwargs, tensors)
            self._compiled += variant.run is not None
            self._describe = native.describe() or describe
            if self._compiled == MAX_COMPILED and variant.run is not None:
                log.info("%s: %s; new ones run as ATen", self.name, self._full.why)
            self.variants[key] = variant
        return variant

    def _why_native(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> str | None:
        tensors = attention.read(tensors) if self.overload in ATTENTION else tensors
        return why_native(tensors, self.target, options if self._makes else {})

    def _why_numbers(self, tensors: Sequence[Tensor]) -> str | None:
        """Why a call with another number than calls like it is ATen's, or None."""
        assert self._numbers is not None
        alike = tuple((t.dtype, t.shape, t.stride()) for t in tensors)
        self._numbers[alike] += 1
        return "its number is another each time" if self._numbers[alike] > MAX_NUMBERS else None

    def _compile(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Variant:
        config = Config.from_call()
        try:
            variant = in_clean_thread(
                lambda: compile_one(self.overload, args, kwargs, self.target, config, self.form)
            )
        except Exception as error:
            if config.strict:
                raise
            log.warning("%s runs as ATen: %s: %s", self.name, type(error).__name__, error)
            return Variant(None, False, f"{type(error).__name__}: {error}")
        if variant.why:
            log.info("%s runs as ATen: %s", self.name, variant.why)
        return variant

    def _check_layouts(
        self,
        variant: Variant,
        keyset: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
    ) -> None:
        """Compare with ATen's own results, once: FakeTensors promise other strides for some ops."""
        if str(self.overload) in UPDATING:  # vectors, which are not updated twice
            args = [a.clone() if isinstance(a, Tensor) and a.ndim == 1 else a for a in args]
        _here.off = True
        try:
            out = self._aten(keyset, args, kwargs)
            if self.overload in ATTENTION and variant.run is not None:
                variant.run = attention.completed(variant.run, out)
            if variant.layouts is None and variant.run is not None:
                variant.layouts = [layout_of(t) for t in variant.run(list(tensors))]
        except Whole as why:
            self._leave(variant, str(why))
            return
        finally:
            _here.off = False
        if self.overload in ON_HOST or variant.layouts is None:
            return
        eager = [layout_of(t) for t in ([out] if variant.single else out)]
        if eager != list(variant.layouts):
            self._leave(variant, f"ATen returns {eager}, its meta {variant.layouts}")

    def _leave(self, variant: Variant, why: str) -> None:
        """Calls of this description are ATen's from now on."""
        variant.run, variant.why = None, why
        log.info("%s runs as ATen: %s", self.name, why)

    def _give_up(self, variant: Variant, error: Exception) -> None:
        """A kernel that fails when first run is not run again; a later failure is the device's."""
        if isinstance(error, Whole):
            self._leave(variant, str(error))
            return
        first = variant.calls == 1 and not isinstance(error, torch.OutOfMemoryError)
        if not first or Config.from_call().strict:
            raise error
        log.warning("%s runs as ATen: its kernel failed: %s", self.name, error)
        variant.run, variant.why = None, f"its kernel failed: {error}"


def aten_name(overload: torch._ops.OpOverload) -> str:
    """As ATen spells it: ``gelu``, ``add.Tensor``."""
    return overload.name().removeprefix("aten::")


def _arguments(overload: torch._ops.OpOverload) -> Sequence[Any]:
    return overload._schema.arguments


# describing a call -------------------------------------------------------------------------------


def describe(values: Iterable[Any], parts: list[Any], tensors: list[Tensor]) -> bool:
    """Append what a kernel is compiled for; False if one of the values is no plain tensor. It is
    the same in C, in describe.h."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            parts += (
                value.dtype,
                value.shape,
                value.stride(),
                value.get_device(),
                value.data_ptr() & 15,
            )
            tensors.append(value)
        elif kind is float:
            parts.append(value.hex())  # 0.0 equals -0.0 and 1, and a NaN not even itself
        elif kind is list or kind is tuple:
            parts.append(len(value))
            if not describe(value, parts, tensors):
                return False
        elif isinstance(value, Tensor):
            return False
        else:
            parts.append(kind)
            parts.append(value)
    return True


# compiling one -----------------------------------------------------------------------------------


def compile_one(
    overload: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    target: Target,
    config: Config,
    form: Form | None = None,
) -> Variant:
    """The call as a graph of one node, through the compiler; or of what torch takes it apart into,
    if that node is no declared op. ``form``: what the overload is, if it writes."""
    if overload in ATTENTION and (why := attention.why_native(overload, args, kwargs, target)):
        return Variant(None, False, why)
    if (rule := SIZED.get(overload) or ATTENTION.get(overload)) is not None:
        compiled = lambda make: _compiled(make(), overload, target, config)  # noqa: E731
        steps = Steps(lambda make: in_clean_thread(lambda: compiled(make)))
        run = program(rule, args, kwargs, steps)
        return Variant(run, len(overload._schema.returns) == 1, layouts=None)
    functional = overload if form is None else form.functional
    if is_convolution(functional):
        made = convolution_graph(functional, args, kwargs, target)
        return _compiled(made, overload, target, config, PRODUCTS)
    variant = Variant(None, False)
    whole = str(functional) in OPS or single_op(functional) is not None
    makes: list[Callable[..., OneCall]] = [one_node_graph]
    if not whole:
        makes.append(composed_graph)
    if functional in LONG_SCANS or functional in LISTS:
        makes = [composed_graph, one_node_graph]
    if functional in BAGS:
        makes = [partial(composed_graph, keep=KEPT), composed_graph]
    if functional._schema.is_mutable and form is not None:
        makes = [composed_graph]
    for make in makes:
        variant = _compiled(make(overload, args, kwargs, form), overload, target, config)
        if variant.run is not None:
            break
    if variant.run is not None and overload in ON_HOST:
        variant.run = told(variant.run)
    return variant


def _compiled(
    made: OneCall,
    overload: torch._ops.OpOverload,
    target: Target,
    config: Config,
    also: Collection[str] = (),
) -> Variant:
    """``also``: overloads of which calls may be ATen's."""
    from .backend import lowering_options
    from .lowering.graph import is_view
    from .lowering.pipeline import compile_graph
    from .lowering.translate import makes_nothing

    if isinstance(made, str):
        return Variant(None, False, made)
    gm, inputs, single = made
    if target.backend == "cuda":
        native.start(cache_dir()).wait()  # a second once a machine; calls are launched by it
    # A pool of workers would take longer to start than one kernel to compile.
    options = replace(lowering_options(config, target), alone=True, threads=0)
    run, report = compile_graph(gm, inputs, options, f"eager_{aten_name(overload)}")
    # what is absent, a saved buffer that a GPU needs not, a view of the result, a seed that the
    # host does not draw
    full = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    called = {*full, *(report.plan.aten if report.plan is not None else ())}
    may = {SEED, *also}
    free = [n for n in called if makes_nothing(n) or is_view(n) or name_of(n.target) in may]
    if report.launches and report.aten_calls == len(free):
        (output,) = gm.graph.find_nodes(op="output")
        layouts = [layout_of(n and n.meta["val"]) for n in output.args[0]]
        return Variant(run, single, "", layouts)
    why = [*report.failures, *report.aten]
    return Variant(None, single, "; ".join(why) or "it computes nothing")


def in_clean_thread(make: Callable[[], Variant]) -> Variant:
    """Run in a thread of its own: no dispatch mode, autocast, vmap or tracing of the caller's."""
    enter_fake_mode_once()
    found: list[Variant] = []
    failed: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def body() -> None:
        _here.off = True
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.no_grad():
                found.append(make())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="gems-eager-compile", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
