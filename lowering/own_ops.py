"""Ops of ours that are written once, as a plain function of torch's.

``own_op`` makes of a function on tensors a torch op ``gems::name``, ``gradient_of`` of another one
its backward, an op as well. A compile with this backend takes both apart into what the functions
call (``decompose.OWN_RULES``), so that they fuse with their neighbours. Anywhere else they run as
kernels that the layer above compiles from the same functions (``kernels.served``), or as written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.fused import register_torch_ops
from ..kernels.served import served
from ..kernels.transforms import register_batching, register_gradient
from .decompose import OWN_RULES

register_torch_ops()
_LIBRARY = torch.library.Library("gems", "FRAGMENT")
#: what autograd differentiates of an op within ``torch.func``: see ``kernels.transforms``
_PLAIN: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def own_op(
    schema: str,
    fake: Callable[..., Any] | None = None,
    transformed: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Register the decorated function, which writes none of its arguments, as ``gems::`` op.

    ``fake``: what says the results' shapes and strides. An op that has one is not taken apart: it
    runs as its function is written, in which other ops may be served.
    ``transformed``: the same function for ``torch.func``, where the function writes what it made.
    """

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload:
        name = schema.split("(", 1)[0]
        plain = _without_autocast(function)
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        run = served(name, plain) if fake is None else plain
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gems::{name}", fake or plain, lib=_LIBRARY)
        overload = getattr(torch.ops.gems, name).default
        _PLAIN[overload] = plain if transformed is None else _without_autocast(transformed)
        register_batching(_LIBRARY, name, _PLAIN[overload])
        if fake is None:
            OWN_RULES[overload] = plain
        return overload

    return register


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is where autocast is off: its casts are its own."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        if not under_autocast(first):
            return function(*args)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args)

    return run


def under_autocast(x: Tensor) -> bool:
    device = x.device.type
    # torch 2.11's Dynamo cannot trace the question whether a device has autocast
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def gradient_of(
    forward: torch._ops.OpOverload, schema: str, gradients: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Register the decorated function as an op, and as the backward of ``forward``.

    Names say what is what. Of its parameters ``dy`` is the gradient of the output ``y``; any other
    is the input or the output of that name, and these alone are saved. An output without such a
    parameter has no gradient. Its result ``dx`` is the gradient of the input ``x``; ``gradients``
    names those of inputs for which it is called otherwise.
    """

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload:
        backward = own_op(schema)(function)
        bound = _Gradient(forward._schema, backward, gradients or {})
        name = forward._schema.name.removeprefix("gems::")
        register_gradient(_LIBRARY, name, _PLAIN[forward], bound.run, bound.save)
        return backward

    return register


class _Gradient:
    """What autograd calls for one op: what is saved, and how the backward op is called."""

    def __init__(
        self, forward: Any, backward: torch._ops.OpOverload, gradients: Mapping[str, str]
    ) -> None:
        self.backward, self.name = backward, forward.name
        self.inputs = [a.name for a in forward.arguments]
        self.outputs = [r.name for r in forward.returns]
        self.taken = [a.name for a in backward._schema.arguments]
        made = [r.name for r in backward._schema.returns]
        named = {name: gradients.get(name, f"d{name}") for name in self.inputs}
        self.place = [made.index(n) if n in made else None for n in named.values()]
        self.fixed = [k for k, n in enumerate(self.outputs) if f"d{n}" not in self.taken]

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(outputs[k] for k in self.fixed))
        # Where all outputs have a gradient, zeros stand for one that is missing.
        ctx.set_materialize_grads(not self.fixed)
        known = dict(zip(self.inputs, inputs, strict=True))
        known.update(zip(self.outputs, outputs, strict=True))
        kept = {name: known[name] for name in self.taken if name in known}
        tensors = {n: v for n, v in kept.items() if isinstance(v, Tensor)}
        ctx.names, ctx.others = list(tensors), {n: kept[n] for n in kept.keys() - tensors.keys()}
        ctx.save_for_backward(*tensors.values())

    def run(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.name} has no second gradient: create_graph=True needs its plain form, "
                "written with torch's own ops"
            )
        known = {f"d{name}": grad for name, grad in zip(self.outputs, grads, strict=True)}
        known.update(zip(ctx.names, ctx.saved_tensors, strict=True))
        known.update(ctx.others)
        made = self.backward(*(known[name] for name in self.taken))
        made = made if isinstance(made, tuple) else (made,)
        return tuple(
            made[at] if at is not None and needed else None
            for at, needed in zip(self.place, ctx.needs_input_grad, strict=True)
        )
