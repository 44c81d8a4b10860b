"""The gradients of users' pointwise ops."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .errors import AuthoringError


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
    return backward, _contents(backward, set())


def _contents(function: Any, seen: set[int]) -> Any:
    """What a Python function does, as far as it can be told: its source, that of the functions it
    calls, and the ops and numbers that it names."""
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
        (key, _contents(what, seen))
        if callable(what)
        else (key, repr(what) if isinstance(what, (bool, int, float, str)) else "")
        for key, what in sorted(named.items())
        if not (getattr(what, "__module__", None) or "").startswith("torch")
    ]


def differentiable(
    name: str, backward: Any
) -> tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]:
    """(setup_context, backward) as ``torch.library.register_autograd`` takes them."""

    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
        ctx.constants = [None if isinstance(v, Tensor) else v for v in inputs]
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.floating = [v.is_floating_point() for v in outputs]
        ctx.is_tensor = [isinstance(v, Tensor) for v in inputs]

    def gradients(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if backward is None:
            raise AuthoringError(
                f"{name} has no backward, and a gradient through it is asked for; declare one with "
                f"@{name}.backward, or call it under torch.no_grad()"
            )
        saved = iter(ctx.saved_tensors)
        values = [
            next(saved) if is_tensor else constant
            for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        ]
        found = backward(*itertools.compress(grads, ctx.floating), *values)
        found = found if isinstance(found, (tuple, list)) else (found,)
        if len(found) != sum(ctx.is_tensor):
            raise AuthoringError(
                f"{name}: its backward returned {len(found)} gradients for {sum(ctx.is_tensor)} "
                "tensors"
            )
        # torch leaves out arguments that equal their default
        needed, many = (*ctx.needs_input_grad, *[False] * len(values)), iter(found)
        return tuple(
            _fitted(next(many), v, need) if isinstance(v, Tensor) else None
            for v, need in zip(values, needed, strict=False)
        )

    return setup, gradients


def _fitted(grad: Tensor | None, x: Tensor, needed: bool) -> Tensor | None:
    """The gradient of a tensor that was broadcast and promoted."""
    if grad is None or not needed or not torch.is_floating_point(x):
        return None
    return grad.sum_to_size(x.shape).to(x.dtype)
