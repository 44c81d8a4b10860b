"""Calls of a user's pointwise op in eager mode: the compiler with a graph of one node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .calls.forms import OUT, Form, share_memory
from .calls.one_call import compile_one, in_clean_thread
from .calls.one_op import MAX_COMPILED
from .calls.operands import PLAIN, describe
from .calls.varying import Family, Sizes, Variant, family_of
from .config import Config, vendor
from .errors import AuthoringError
from .kernels.target import Target, current_target


class UserOp:
    """What the dispatcher calls for ``overload``; ``results`` makes the tensors it returns."""

    def __init__(
        self,
        overload: torch._ops.OpOverload,
        name: str,
        results: Callable[[Sequence[Any]], list[Tensor]],
    ) -> None:
        self.overload, self.name, self.results = overload, name, results
        self.defaults = [a.default_value for a in overload._schema.arguments]
        self.single = len(overload._schema.returns) == 1
        self.variants: dict[Any, Variant] = {}
        self.families: dict[Any, Family] = {}
        self.lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        values = [_plain(a) for a in (*args, *self.defaults[len(args) :])]
        if any(isinstance(v, Tensor) and not v.numel() for v in values):
            made = self.results(values)
            if not made[0].numel():
                return made[0] if self.single else tuple(made)
        found = self._run(values, ())
        return found[0] if self.single else tuple(found)

    # in place ------------------------------------------------------------------------------------

    def write(self, values: Sequence[Any], places: Sequence[Tensor]) -> bool:
        """Let a kernel store its results in ``places`` at once; False where it cannot."""
        tensors = [*places, *(v for v in values if isinstance(v, Tensor))]
        distinct = list({id(t): t for t in tensors}.values())
        plain = (
            all(type(t) in PLAIN and t.numel() for t in distinct)
            and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, distinct))
            and torch.utils._python_dispatch._get_current_dispatch_mode() is None
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in distinct))
            and not any(t.is_neg() for t in distinct)
        )
        if not plain or share_memory(distinct, distinct) or self._run(values, places) is None:
            return False
        torch.autograd.graph.increment_version([t for t in places if not t.is_inference()])
        return True

    # kernels -------------------------------------------------------------------------------------

    def _run(self, values: Sequence[Any], places: Sequence[Tensor]) -> Any:
        parts: list[Any] = [len(places)]
        tensors: list[Tensor] = []
        describe([*values, *places], parts, tensors)
        distinct = list({id(t): t for t in tensors}.values()) if places else tensors
        if places:  # which of them are one
            parts += [next(k for k, d in enumerate(distinct) if d is t) for t in tensors]
        key = tuple(parts)
        variant = self.variants.get(key) or self._new_variant(key, values, places, distinct)
        variant.calls += 1
        if variant.run is None:  # a place that its result cannot be stored in
            return None
        try:
            return variant.run(distinct)
        except Exception as error:
            if variant.calls > 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise AuthoringError(f"{self.name}: its kernel failed: {error}") from error

    def _new_variant(
        self, key: Any, values: Sequence[Any], places: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> Variant:
        target = self._target(values)
        with self.lock:
            if key not in self.variants:
                while len(self.variants) >= MAX_COMPILED:
                    del self.variants[next(iter(self.variants))]  # kernels stay in the disk cache
                family = self.families.setdefault(family_of(key), Family())
                found = family.served_by(tensors)
                if found is None:
                    make = partial(self._compiled, values, places, target)
                    found = family.compile(tensors, make)
                self.variants[key] = found
            return self.variants[key]

    def _target(self, values: Sequence[Any]) -> Target:
        target = current_target(vendor())
        device = next(v.device for v in values if isinstance(v, Tensor))
        if target is None:
            raise AuthoringError(
                f"{self.name} has no kernel here: there is no GPU, and Triton's interpreter is off "
                "(TRITON_INTERPRET=1 before the program starts)"
            )
        if device.type != target.device:
            raise AuthoringError(
                f"{self.name} has no kernel for tensors on {device}; kernels run on {target.device}"
            )
        return target

    def _compiled(
        self, values: Sequence[Any], places: Sequence[Tensor], target: Target, sizes: Sizes | None
    ) -> Variant:
        """``sizes``: see ``compile_one``; a call that is compiled for its own has a kernel."""
        self.results(values)  # raises what is wrong with shapes and dtypes
        if target.device == "cuda" and torch.cuda.is_current_stream_capturing():
            raise AuthoringError(
                f"{self.name} cannot compile a kernel while a CUDA graph is captured; call it once "
                "with such tensors before"
            )
        overload, config = self.overload, replace(Config.from_call(), strict=True)
        names = tuple(f"out{k}" for k in range(len(places)))
        form = Form(overload, overload, OUT, names, once=True) if places else None
        kwargs = dict(zip(names, places, strict=True))
        try:
            variant = in_clean_thread(
                lambda: compile_one(overload, values, kwargs, target, config, form, sizes)
            )
        except Exception as error:
            if sizes is not None:
                return Variant(None, self.single, str(error))
            raise AuthoringError(f"{self.name} does not compile: {error}") from error
        if variant.run is None and not places and sizes is None:
            raise AuthoringError(f"{self.name} has no kernel for this call: {variant.why}")
        return variant


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and type(value) not in PLAIN:
        return value.as_subclass(Tensor)
    return value
