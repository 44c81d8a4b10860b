"""One ATen overload in eager mode: the compiler with a graph of one node.

A ``Handler`` is what the dispatcher calls instead of ATen's kernel. It describes the call (dtypes,
shapes, strides, alignment, numbers), looks the description up, and runs the kernel compiled for it;
a description met for the first time is compiled. Whatever has no kernel goes to ATen's own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import Config
from ..kernels.composed import UPDATING
from ..kernels.dropout import drawing_from, source
from ..kernels.target import Target
from ..lowering import native
from ..lowering.private import forget_dispatch
from . import attention
from .aten_kernel import native_kernel, with_numbers_as_tensors
from .attention import ATTENTION
from .forms import Form, places, share_memory
from .lists import count_versions
from .one_call import Variant, aten_name, compile_one, in_clean_thread, inside, takes_any_sizes
from .operands import describe, layout_of, takes_lazily_negated, why_native
from .rules import ON_HOST
from .varying import Family, Numbers, Sizes, family_of
from .whole import Whole
from .worth import least_elements, why_not_worth, worth_sharing

log = logging.getLogger(__name__)

#: Kernels compiled for one overload. A workload whose shapes never repeat would compile for ever.
MAX_COMPILED = 256
#: Descriptions remembered for one overload; most of them say "ATen".
MAX_VARIANTS = 4096

NUMBERS = (bool, int, float, complex)


class Watcher(Protocol):
    """Told of every call that one of our kernels served."""

    def saw(self, name: str) -> None: ...


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
        self._any_sizes = takes_any_sizes(overload, form)
        self._families: dict[Any, Family] = {}
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
        self._numbers = Numbers(overload)
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
        shared = [v for family in list(self._families.values()) for v in family.shared()]
        every = [*list(self.variants.values()), *shared, self._full]
        variants = {id(v): v for v in every}.values()
        return {
            "ours": sum(v.calls for v in variants if v.run is not None),
            "native": sum(v.calls for v in variants if v.run is None) + self.left,
            "compiled": sum(v.run is not None for v in variants),
        }

    # a call --------------------------------------------------------------------------------------

    def __call__(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if inside.off:
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
        inside.off = True
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
            inside.off = False
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
        with self._lock:
            if key in self.variants:
                return self.variants[key]
            if len(self.variants) >= MAX_VARIANTS and not self._forget():
                return self._full
            family, variant = None, None
            if why := self._why_atens(args, kwargs, tensors):
                variant = Variant(None, False, why)
            elif self._any_sizes:
                family = self._families.setdefault(family_of(key), Family())
                variant = family.served_by(tensors)
            if variant is None:
                if self.target.device == "cuda" and torch.cuda.is_current_stream_capturing():
                    return Variant(None, False, "a CUDA graph is captured: no module can be loaded")
                if self._compiled >= MAX_COMPILED:
                    return self._full
                make = partial(self._compile, keyset, args, kwargs, tensors)
                variant = (
                    make(None)
                    if family is None
                    else family.compile(tensors, make, self._worth_sharing)
                )
                self._compiled += variant.run is not None
                if self._compiled == MAX_COMPILED and variant.run is not None:
                    log.info("%s: %s; new ones run as ATen", self.name, self._full.why)
            self._describe = native.describe() or describe
            self.variants[key] = variant
        return variant

    def _forget(self) -> int:
        """Forget what is soon found again: which calls were ATen's, and which sizes shared kernels
        were called with; returns how many those were."""
        found = [key for key, v in self.variants.items() if v.shared or v.run is None]
        for key in found:
            variant = self.variants.pop(key)
            self.left += 0 if variant.shared else variant.calls
        return len(found)

    def _why_atens(
        self, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> str | None:
        """Why a call is ATen's whatever is compiled, or None."""
        why = self._why_native(tensors, kwargs)
        if not tensors and self._tensor_places:
            why = "its operands are numbers"
        if why is None and self.least is not None:
            why = why_not_worth(self.name, args, self.target)
        return why or self._numbers.why_not(args, kwargs)

    def _why_native(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> str | None:
        tensors = attention.read(tensors) if self.overload in ATTENTION else tensors
        return why_native(tensors, self.target, options if self._makes else {})

    def _worth_sharing(self, which: str) -> bool:
        return worth_sharing(self.name, which, self.target)

    def _compile(
        self,
        keyset: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        sizes: Sizes | None,
    ) -> Variant:
        """``sizes``: see ``compile_one``."""
        config = Config.from_call()
        try:
            variant = in_clean_thread(
                lambda: compile_one(
                    self.overload, args, kwargs, self.target, config, self.form, sizes
                )
            )
        except Exception as error:
            if config.strict:
                raise
            variant = Variant(None, False, f"{type(error).__name__}: {error}")
            if sizes is None:
                log.warning("%s runs as ATen: %s", self.name, variant.why)
        else:
            if variant.run is not None and not self._random and self.form is None:
                self._check_layouts(variant, keyset, args, kwargs, tensors)
            elif variant.why:
                instead = "runs as ATen" if sizes is None else "is compiled for its own sizes"
                log.info("%s %s: %s", self.name, instead, variant.why)
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
            tensors = [t.clone() if t.ndim == 1 else t for t in tensors]
        inside.off = True
        try:
            out = self._aten(keyset, args, kwargs)
            if self.overload in ATTENTION and variant.run is not None:
                variant.run = attention.completed(variant.run, out)
        except Whole as why:
            self._leave(variant, str(why))
            return
        else:
            if variant.layouts is None and variant.run is not None:
                self._layouts_by_a_run(variant, variant.run, tensors)
        finally:
            inside.off = False
        if self.overload in ON_HOST or variant.layouts is None:
            return
        eager = [layout_of(t) for t in ([out] if variant.single else out)]
        if eager != list(variant.layouts):
            self._leave(variant, f"ATen returns {eager}, its meta {variant.layouts}")

    def _layouts_by_a_run(
        self, variant: Variant, run: Callable[[list[Any]], Any], tensors: Sequence[Tensor]
    ) -> None:
        try:
            variant.layouts = [layout_of(t) for t in run(list(tensors))]
        except Exception as error:
            self._give_up(variant, error)

    def _leave(self, variant: Variant, why: str) -> None:
        """Calls of this description are ATen's from now on."""
        variant.run, variant.why = None, why
        log.info("%s runs as ATen: %s", self.name, why)

    def _give_up(self, variant: Variant, error: Exception) -> None:
        """A kernel that fails when first run is not run again; a later failure is the device's."""
        if isinstance(error, Whole):
            self._leave(variant, str(error))
            return
        first = variant.calls <= 1 and not isinstance(error, torch.OutOfMemoryError)
        if not first or Config.from_call().strict:
            raise error
        log.warning("%s runs as ATen: its kernel failed: %s", self.name, error)
        variant.run, variant.why = None, f"its kernel failed: {error}"


def _arguments(overload: torch._ops.OpOverload) -> Sequence[Any]:
    return overload._schema.arguments
