"""The gradients of users' pointwise ops."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from .errors import AuthoringError
from .kernels.transforms import is_transformed


def facts_of_backward(name: str, backward: Any, tensors: Sequence[str]) -> tuple[Any, Any]:
    """(the function that computes gradients, what tells it from others)."""
    if backward is None:
        return None, None
    if hasattr(backward, "op") and hasattr(backward, "rules"):  # a Pointwise
        if len(backward.rules) != len(tensors):
            raise AuthoringError(
                f"{name}: its backward {backward.__name__} has {len(backward.rules)} outputs for "
                f"{len(tensors)} tensors ({', '.join(tensors)}); it returns a gradient for each"
            )
        return backward, str(backward.op)
    if not callable(backward) or hasattr(backward, "fn"):
        raise AuthoringError(
            f"{name}: its backward {backward!r} is neither a pointwise op nor a function of "
            "tensors; a function of triton.jit needs @gems_compile.pointwise above it"
        )
    return backward, contents(backward)


def contents(function: Any, seen: set[int] | None = None) -> Any:
    """What a Python function does, as far as it can be told: its source, that of the functions it
    calls, and the ops and numbers that it names."""
    seen = set() if seen is None else seen
    if not isinstance(function, FunctionType) or id(function) in seen:
        return repr(getattr(function, "op", getattr(function, "__qualname__", type(function))))
    seen.add(id(function))
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = function.__code__.co_code.hex() + repr(function.__code__.co_consts)
    used = inspect.getclosurevars(function)
    named = {**used.globals, **used.nonlocals}
    return text, [
        (key, contents(what, seen))
        if callable(what)
        else (key, repr(what) if isinstance(what, (bool, int, float, str)) else "")
        for key, what in sorted(named.items())
        if not (getattr(what, "__module__", None) or "").startswith("torch")
    ]


def differentiated(op: torch._ops.OpOverload, name: str, backward: Any) -> Callable[..., Any]:
    """What runs for ``op`` where autograd is, whether it or ``torch.func`` asks, backward or
    forward mode. ``torch.library.register_autograd`` knows neither of the second ones."""
    parts = {"op": op, "told": name, "given": staticmethod(backward) if backward else None}
    function: Any = type(f"{name}_gradient", (_Gradient,), parts)
    defaults = [a.default_value for a in op._schema.arguments]

    def run(keyset: Any, *args: Any) -> Any:
        values = (*args, *defaults[len(args) :])  # torch leaves out what equals its default
        recorded = torch.is_grad_enabled() and any(
            isinstance(v, Tensor) and v.requires_grad for v in values
        )
        if recorded or is_transformed():
            with enable_single_level_autograd_function():
                return function.apply(keyset, *values)
        return _Gradient.below(op, keyset, values)

    return run


class _Gradient(_SingleLevelFunction):
    """An autograd function of ``op``; ``given`` computes its gradients. Of one level: it is made
    where ``torch.func`` has come to the level that differentiates, and calls the op below that."""

    op: torch._ops.OpOverload
    told: str
    given: Any

    @staticmethod
    def below(op: Any, keyset: Any, values: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *values)

    @classmethod
    def forward(cls, keyset: Any, *values: Any) -> Any:
        if not is_transformed():
            return cls.below(cls.op, keyset, values)
        with torch.enable_grad(), _set_fwd_grad_enabled(True):  # other levels' derivatives
            return cls.below(cls.op, keyset, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        _, *values = inputs
        tensors = [v for v in values if isinstance(v, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.constants = [None if isinstance(v, Tensor) else v for v in values]
        ctx.is_tensor = [isinstance(v, Tensor) for v in values]
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.made = [(v.shape, v.dtype, v.device) for v in outputs]

    @classmethod
    def gradients(cls, ctx: Any, grads: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The op's arguments, and the gradient of each that is a tensor, as it was given."""
        if cls.given is None:
            raise AuthoringError(
                f"{cls.told} has no backward, and a gradient through it is asked for; declare one "
                f"with @{cls.told}.backward, or call it under torch.no_grad()"
            )
        saved = iter(ctx.saved_tensors)
        values = [
            next(saved) if is_tensor else constant
            for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        ]
        floating = [dtype.is_floating_point for _, dtype, _ in ctx.made]
        found = cls.given(*itertools.compress(grads, floating), *values)
        found = found if isinstance(found, (tuple, list)) else (found,)
        if len(found) != sum(ctx.is_tensor):
            raise AuthoringError(
                f"{cls.told}: its backward returned {len(found)} gradients for "
                f"{sum(ctx.is_tensor)} tensors"
            )
        many = iter(found)
        return values, [next(many) if is_tensor else None for is_tensor in ctx.is_tensor]

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        values, found = cls.gradients(ctx, grads)
        needed = ctx.needs_input_grad[1:]
        fitted = map(_fitted, found, values, needed)
        return None, *fitted

    @classmethod
    def jvp(cls, ctx: Any, _: Any, *tangents: Any) -> Any:
        """Each element depends on its own operands alone, so that the gradients where one output's
        is 1 and the others' are 0 are the factors of the operands' tangents."""
        pushed = [cls._pushed(ctx, k, tangents) for k in range(len(ctx.made))]
        return tuple(pushed) if len(pushed) > 1 else pushed[0]

    @classmethod
    def _pushed(cls, ctx: Any, place: int, tangents: Sequence[Any]) -> Any:
        if not ctx.made[place][1].is_floating_point:
            return None
        ones = [
            torch.full(shape, float(k == place), dtype=dtype, device=device)
            for k, (shape, dtype, device) in enumerate(ctx.made)
        ]
        values, found = cls.gradients(ctx, ones)
        shape, dtype, _ = ctx.made[place]
        total = torch.zeros_like(ones[place])
        for value, factor, tangent in zip(values, found, tangents, strict=True):
            if tangent is None or factor is None:
                continue
            if factor.shape != shape:
                raise AuthoringError(
                    f"{cls.told}: its backward sums a gradient to {list(value.shape)}, where the "
                    f"result is {list(shape)}; forward mode needs one for each element"
                )
            total = total + (factor * tangent).to(dtype)
        return total


def _fitted(grad: Tensor | None, x: Tensor, needed: bool) -> Tensor | None:
    """The gradient of a tensor that was broadcast and promoted."""
    if grad is None or not needed or not torch.is_floating_point(x):
        return None
    return grad.sum_to_size(x.shape).to(x.dtype)
