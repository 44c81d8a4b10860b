"""A call in eager mode as a graph of one node, for the compiler."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.op import OPS
from ..lowering.foreach import single_op
from .forms import Form, add_writes, functional_call, places
from .varying import Sizes

#: a graph, its inputs as FakeTensors, and whether the call returns one tensor; or why there is none
OneCall = tuple[torch.fx.GraphModule, list[Tensor], bool] | str


def one_node_graph(
    overload: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    form: Form | None = None,
    sizes: Sizes | None = None,
) -> OneCall:
    """The graph of a call. That of a form computes what its functional overload returns, and stores
    it. Each tensor has a placeholder, in the order in which they come when it runs; one that is
    given twice has two, as other calls of this description give two tensors; see ``Form.once``.
    ``sizes``: those that the graph is for, if not the call's own."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = torch.fx.Graph()
    inputs: list[Tensor] = []
    known: dict[int, torch.fx.Node] = {}
    like = _of_its_sizes if sizes is None else sizes.fake

    def place(value: Any) -> Any:
        if form is not None and form.once and id(value) in known:
            return known[id(value)]
        if isinstance(value, Tensor):
            node = known[id(value)] = graph.placeholder(f"x{len(inputs)}")
            node.meta["val"] = like(len(inputs), value)
            inputs.append(node.meta["val"])
            return node
        return [place(v) for v in value] if isinstance(value, (list, tuple)) else value

    with FakeTensorMode(shape_env=None if sizes is None else sizes.env):
        node_args: Sequence[Any] = tuple(place(a) for a in args)
        node_kwargs = {name: place(a) for name, a in kwargs.items()}
        written: list[torch.fx.Node] = []
        if form is not None:
            written = places(form, node_args, node_kwargs)
            overload = form.functional
            node_args, node_kwargs = functional_call(form, node_args, node_kwargs)
        node = graph.call_function(overload, tuple(node_args), node_kwargs)
        fake_args, fake_kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            val = overload(*fake_args, **fake_kwargs)
        except Exception as error:  # ATen's kernel refuses the call, with its own words
            return f"its shapes are unknown: {error}"
        node.meta["val"] = val
        single = isinstance(val, Tensor)
        results = (node,) if single else _items(graph, node, val)
        if form is not None:
            op = OPS.get(str(single_op(overload) or overload))
            pointwise = op is not None and op.kind == "pointwise"
            if why := add_writes(form, graph, results, written, pointwise):
                return why
            results = ()
    graph.output(results)
    return torch.fx.GraphModule(torch.nn.Module(), graph), inputs, single


def _of_its_sizes(_: int, real: Tensor) -> Tensor:
    return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=real.device)


def _items(graph: torch.fx.Graph, node: torch.fx.Node, val: Sequence[Any]) -> tuple[Any, ...]:
    out: list[Any] = []
    for k, v in enumerate(val):
        item = None if v is None else graph.call_function(operator.getitem, (node, k))
        if item is not None:
            item.meta["val"] = v
        out.append(item)
    return tuple(out)
