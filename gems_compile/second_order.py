"""Gradients of gradients of compiled code.

AOTAutograd compiles the first gradient and refuses a second. Where a caller asks for a gradient
that can itself be differentiated (``create_graph=True``), it is computed by running the traced
program in eager mode, whose gradients autograd can differentiate again. Until then a call only
leaves its inputs, and how often each was written, on its autograd node; backward lets them go.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .lowering import private

log = logging.getLogger(__name__)

#: autograd nodes whose class runs ``differentiable`` carry this: the Call they came from
_MARK = "_gems_call"


class Program:
    """A Dynamo graph as it was traced, kept to be run in eager mode.

    ``random``: it draws random numbers, which another run would draw anew.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._root, self._graph = gm, fx.Graph()
        self._graph.output(self._graph.graph_copy(gm.graph, {}))
        self._module: fx.GraphModule | None = None
        self._autocast = _autocast_state()
        self.random = False

    def run(self, args: Sequence[Any]) -> Any:
        if self._module is None:
            self._module = fx.GraphModule(self._root, self._graph)
        with contextlib.ExitStack() as stack:
            for device, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype))
            return self._module(*args)


def _autocast_state() -> list[tuple[str, torch.dtype]]:
    return [
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]


class Call:
    """The inputs of one call of a program, as they were."""

    def __init__(self, program: Program, args: tuple[Any, ...]) -> None:
        self.program, self.args = program, args
        self.versions = [a._version if isinstance(a, Tensor) else 0 for a in args]

    def changed(self) -> bool:
        return any(
            isinstance(a, Tensor) and a._version != version
            for a, version in zip(self.args, self.versions, strict=True)
        )


def with_second_order(compiled: Callable[..., Any], program: Program) -> Callable[..., Any]:
    """``compiled``, AOTAutograd's function of the program, with gradients of gradients."""

    def run(*args: Any) -> Any:
        outs = compiled(*args)
        for out in outs if isinstance(outs, (tuple, list)) else (outs,):
            node = out.grad_fn if isinstance(out, Tensor) else None
            if node is not None and _prepare(node):
                setattr(node, _MARK, Call(program, args))
                break
        return outs

    if hasattr(compiled, "serialize"):  # for ``aot_compile``, whose file has first gradients only
        run.serialize = compiled.serialize  # type: ignore[attr-defined]
    return run


def _prepare(node: Any) -> bool:
    """Let the node's class compute differentiable gradients; whether it is AOTAutograd's."""
    cls = private.compiled_function(node)
    if cls is None:
        return False
    if not hasattr(cls, _MARK):
        setattr(cls, _MARK, True)
        cls.backward = staticmethod(_backward_of(cls.backward))
    return True


def _backward_of(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        call: Call | None = getattr(ctx, _MARK, None)
        if call is not None and torch.is_grad_enabled():
            # torch 2.11 passes the gradients one by one, 2.13 as a list
            given = grads[0] if len(grads) == 1 and isinstance(grads[0], list) else grads
            why = _why_not(call, ctx, given)
            if why is None:
                return differentiable(call, given)
            log.info("no second gradient through compiled code: %s", why)
        elif call is not None and not private.backward_keeps_graph():
            setattr(ctx, _MARK, None)
        return compiled(ctx, *grads)

    return backward


def _why_not(call: Call, ctx: Any, grads: Sequence[Any]) -> str | None:
    """Why AOTAutograd's backward must run, which raises when it is differentiated."""
    if call.program.random:
        return "it draws random numbers"
    why = private.why_not_plain(ctx, len(grads), len(call.args))
    if why is not None:
        return why
    if call.changed():
        return "an input was written since"
    return None


def differentiable(call: Call, grads: Sequence[Any]) -> tuple[Any, ...]:
    """The gradients of one call for its inputs, as autograd computes them in eager mode."""
    with torch.enable_grad():
        outs = call.program.run(call.args)
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outs, grads, strict=True)
            if isinstance(out, Tensor) and out.requires_grad and grad is not None
        ]
        wanted = [a for a in call.args if isinstance(a, Tensor) and a.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    rest = iter(found)
    return tuple(
        next(rest) if isinstance(a, Tensor) and a.requires_grad else None for a in call.args
    )
