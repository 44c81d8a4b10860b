"""A call of a composed overload as a graph of declared ops: see ``kernels.composed``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .forms import OUT, TENSORS, Form, add_writes, functional_call, places
from .varying import Sizes


def composed_graph(
    overload: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    form: Form | None = None,
    sizes: Sizes | None = None,
    keep: Collection[torch._ops.OpOverload] = (),
) -> tuple[fx.GraphModule, list[Tensor], bool] | str:
    """The graph of what torch's rules make of a call, its inputs as FakeTensors, and whether the
    call returns one tensor; or why there is none. ``keep``: overloads that rules call, and that are
    not taken apart in turn. See ``one_node.one_node_graph``."""
    from ..lowering.graph import output_node

    functional = overload if form is None else form.functional
    given = (args, kwargs) if form is None else functional_call(form, args, kwargs)
    gm = _traced(functional, *given, keep, sizes)
    if isinstance(gm, str):
        return gm
    graph, output = gm.graph, output_node(gm.graph)
    inputs = [*graph.find_nodes(op="placeholder")]
    results: Any = output.args[0]
    if form is not None and functional is not overload:
        written = inputs[: len(places(form, args, kwargs))]  # of an in-place form, the first
        if form.kind == OUT:
            first = next(node for node in graph.nodes if node.op != "placeholder")
            with graph.inserting_before(first):  # in the order in which they come when it runs
                written = [graph.placeholder(name) for name in form.written]
            mode = results[0].meta["val"].fake_mode
            for k, (node, name) in enumerate(zip(written, form.written, strict=True), len(inputs)):
                node.meta["val"] = _like(k, kwargs[name], sizes, mode)
            inputs += written
        with graph.inserting_before(output):
            results = [_joinable(graph, result) for result in results]
            if why := add_writes(form, graph, results, written, pointwise=False):
                return why
        output.args = ((),)
    gm.recompile()
    returns = functional._schema.returns
    single = len(returns) == 1 and str(returns[0].type) != TENSORS
    return gm, [node.meta["val"] for node in inputs], single


def _joinable(graph: fx.Graph, result: fx.Node) -> fx.Node:
    """A kernel that is written as a whole stores no copy of its result; one that reads it does."""
    from ..lowering.graph import viewed
    from ..lowering.overload import name_of
    from ..lowering.whole import WHOLE

    if name_of(viewed(result).target) not in WHOLE:
        return result
    node = graph.call_function(torch.ops.aten.bitwise_or.Scalar, (result, 0))
    node.meta["val"] = result.meta["val"].clone()
    return node


def _traced(
    overload: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    keep: Collection[torch._ops.OpOverload],
    sizes: Sizes | None,
) -> fx.GraphModule | str:
    """Its placeholders are the call's tensors, in order, and a tuple of results is at its end."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from ..lowering.decompose import whole_table
    from .rules import rules

    own = rules()
    rule = own.get(overload, overload)
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    where = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def program(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for k, tensor in zip(where, tensors, strict=True):
            given[k] = tensor
        args, kwargs = tree_unflatten(given, spec)
        out = rule(*args, **kwargs)
        if out is NotImplemented:  # of this call; torch has another rule
            out = overload(*args, **kwargs)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    traced = make_fx(
        torch.func.functionalize(program, remove="mutations"),
        decomposition_table=whole_table().new_child({**own, **dict.fromkeys(keep, _not_apart)}),
        tracing_mode="fake" if sizes is None else "real",
    )
    tensors = [leaves[k] for k in where]
    try:
        if sizes is None:
            gm = traced(*tensors)
        else:
            with FakeTensorMode(shape_env=sizes.env):
                gm = traced(*[sizes.fake(k, t) for k, t in enumerate(tensors)])
    except Exception as error:  # ATen refuses the call, or its shapes depend on data
        return f"torch's rules do not take it apart: {error}"
    return _why_aliased(gm) or gm


def _like(k: int, real: Tensor, sizes: Sizes | None, mode: Any) -> Tensor:
    """The call's tensor k as a FakeTensor."""
    if sizes is None:
        return mode.from_tensor(real)
    with mode:
        return sizes.fake(k, real)


def _not_apart(*args: Any, **kwargs: Any) -> Any:
    return NotImplemented


def _why_aliased(gm: fx.GraphModule) -> str | None:
    """Why a result is no memory of its own, or None."""
    from ..lowering.graph import output_node, viewed

    found: list[fx.Node] = []
    for node in output_node(gm.graph).args[0]:  # type: ignore[union-attr]
        made = viewed(node) if isinstance(node, fx.Node) else None
        if made is None or made.op != "call_function" or made in found:
            return "a result is an operand, a constant or another result"
        found.append(made)
    return None


def told(run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """The same, with its result as a Python bool, for which the host waits."""
    return lambda tensors: [bool(run(tensors)[0])]
