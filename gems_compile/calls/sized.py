"""Ops whose results' sizes are data, in eager mode: nonzero, masked_select, unique and their like.

A rule is a program of the host: kernels count, the host reads the number, for which it waits as
ATen's does, makes room, and kernels fill it. Each step is a function of tensors, compiled as a
composed call is. The number is a size that its kernels are given: another one compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..lowering.private import some_size
from .whole import Whole

#: a rule: (steps, the overload's arguments) -> results, or NotImplemented of a call that is ATen's
Rule = Callable[..., Any]


class Steps:
    """The steps of the calls of one description; each is compiled when first met.

    compile: what makes a step's graph (see ``one_node.OneCall``) -> what has it as ``run``, or None
             and says ``why``
    """

    def __init__(self, compile: Callable[[Callable[[], Any]], Any]) -> None:
        self._compile = compile
        self._made: dict[Any, Callable[[list[Tensor]], Any]] = {}

    def __call__(
        self, function: Callable[..., Any], *args: Any, grown: Sequence[Tensor] = ()
    ) -> Any:
        """``function(*args, *grown)``: what it returns, a tuple; None where there is nothing to do.

        args:   tensors, whose shapes the description tells, and what else the step is compiled for
        grown:  contiguous tensors whose last size may be any; the function writes none but these,
                and these with ``gems::put_``
        """
        tensors = [*(a for a in args if isinstance(a, Tensor)), *grown]
        key = function, *(a for a in args if not isinstance(a, Tensor))
        run = self._made.get(key)
        if run is None:
            made = self._compile(lambda: _traced(function, args, grown))
            if made.run is None:
                raise Whole(made.why)
            run = self._made[key] = made.run
        if grown and not grown[0].numel():
            return None
        return run(tensors)


def program(rule: Rule, args: Any, kwargs: Any, steps: Steps) -> Callable[[list[Tensor]], Any]:
    """The rule's run of calls like this one, as a function of their tensors."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    where = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def run(tensors: list[Tensor]) -> Any:
        given = list(leaves)
        for k, tensor in zip(where, tensors, strict=True):
            given[k] = tensor
        args, kwargs = tree_unflatten(given, spec)
        out = rule(steps, *args, **kwargs)
        return [out] if isinstance(out, Tensor) else out

    # the variant outlives the call: it must not keep the call's memory
    for k in where:
        leaves[k] = None
    return run


def _traced(
    function: Callable[..., Any], args: Sequence[Any], grown: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[Tensor], bool] | str:
    """See ``one_node.one_node_graph``."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from ..kernels.fused import register_torch_ops
    from ..lowering.decompose import whole_table

    register_torch_ops()
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        fakes: list[Tensor] = [
            mode.from_tensor(a, static_shapes=True) for a in args if isinstance(a, Tensor)
        ]
        for k, room in enumerate(grown):
            sizes = (*room.shape[:-1], some_size(shapes, f"grown{k}"))
            fakes.append(torch.empty(sizes, dtype=room.dtype, device=room.device))

        def step(*tensors: Tensor) -> Any:
            left = iter(tensors)
            return function(*[next(left) if isinstance(a, Tensor) else a for a in args], *left)

        try:
            gm = make_fx(step, decomposition_table=whole_table())(*fakes)
        except Exception as error:
            return f"torch's rules do not take it apart: {error}"
    return gm, fakes, False
