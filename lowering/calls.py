"""Which call of ATen's a call of torch is, however it is spelt: x * 2, x.mul(2), torch.mul(x, 2).

A call is run on FakeTensors, and what reaches PyTorch's dispatcher before autograd is looked at.
One call of ATen's is a word, with its arguments as its schema has them; what PyTorch makes of
several is a word by its own name. ``words.py`` is for the built-in rewrites, whose words say less:
a cast there is any cast.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .graph import is_symbolic, value_of
from .rewrite import is_barrier
from .words import Reading

log = logging.getLogger("gems_compile")

PART = "getitem"  # the word of one of several results

#: other names that PyTorch has for an op, of the same overloads and arguments
_SAME_AS = {
    "aten.absolute": "aten.abs",
    "aten.clip": "aten.clamp",
    "aten.concat": "aten.cat",
    "aten.concatenate": "aten.cat",
    "aten.divide": "aten.div",
    "aten.greater": "aten.gt",
    "aten.greater_equal": "aten.ge",
    "aten.less": "aten.lt",
    "aten.less_equal": "aten.le",
    "aten.multiply": "aten.mul",
    "aten.negative": "aten.neg",
    "aten.not_equal": "aten.ne",
    "aten.subtract": "aten.sub",
    "aten.true_divide": "aten.div",
}

#: their dims count the result's, which has one more
_COUNT_NEW_DIM = frozenset({"aten::unsqueeze", "aten::stack"})


@dataclass(frozen=True)
class _Place:
    """An argument that is one of the call's tensors or sizes: the leaf of that number."""

    number: int


@dataclass(frozen=True)
class _Kind:
    """What calls alike in dtypes, shapes and numbers have in common."""

    word: str
    args: tuple[Any, ...]


class Calls:
    """The reader of one compile: calls that are alike are run once."""

    def __init__(self) -> None:
        self._known: dict[Any, _Kind | None] = {}

    def of_node(self, node: fx.Node) -> Reading | None:
        """The word of a node of a Dynamo graph, None if it has none: a write, random numbers."""
        if node.op == "call_method":
            function = getattr(Tensor, str(node.target), None)
        else:
            function = node.target if node.op == "call_function" else None
        if function is None or is_barrier(node) or not _gives_tensors(value_of(node)):
            return None
        first = node.args[0] if node.args else None
        if function is operator.getitem and isinstance(first, fx.Node):
            if not isinstance(value_of(first), Tensor):
                return Reading(PART, tuple(node.args))
        elif function is operator.truediv and not isinstance(first, fx.Node):
            return self.read(Tensor.__rtruediv__, node.args[::-1], {})  # 1 / x: two calls of ATen's
        return self.read(function, node.args, node.kwargs)

    def read(self, function: Any, args: Any, kwargs: Any) -> Reading | None:
        """The word of a call on FakeTensors, or on nodes that hold them."""
        leaves, spec = tree_flatten((_plain(args), _plain(kwargs)))
        values = [value_of(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        try:
            key = (function, repr(spec), tuple(map(told, values)))
            if key not in self._known:
                self._known[key] = _kind_of(function, values, spec)
        except Exception as error:  # what cannot be run here is no word
            log.debug("%s is no word: %s: %s", function, type(error).__name__, error)
            return None
        kind = self._known[key]
        if kind is None:
            return None
        found = (_argument(a, leaves, values) for a in kind.args)
        return Reading(kind.word, tuple(found))


def _plain(tree: Any) -> Any:
    """fx's own lists and dicts as Python's, so that one call has one structure."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(_plain, tree)) if type(tree) is tuple else [*map(_plain, tree)]
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return tree


def _argument(argument: Any, leaves: Sequence[Any], values: Sequence[Any]) -> Any:
    if not isinstance(argument, _Place):
        return argument
    value = values[argument.number]
    return leaves[argument.number] if isinstance(value, Tensor) else value


def _gives_tensors(value: Any) -> bool:
    found = tree_leaves(value)
    return bool(found) and all(isinstance(leaf, Tensor) for leaf in found)


def told(value: Any) -> Any:
    """What the calls that are made for an argument may depend on."""
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    strides = value.stride() if value.layout == torch.strided else ()
    sizes = (tuple(map(str, value.shape)), tuple(map(str, strides)))
    return value.dtype, value.device, *sizes, value.is_conj(), value.is_neg()


def _kind_of(function: Callable[..., Any], values: Sequence[Any], spec: Any) -> _Kind | None:
    """Run the call; None if it writes into an argument or draws random numbers."""
    places = [i for i, v in enumerate(values) if isinstance(v, Tensor) or is_symbolic(v)]

    def run(*given: Any) -> Any:
        filled = dict(zip(places, given, strict=True))
        args, kwargs = tree_unflatten([filled.get(i, v) for i, v in enumerate(values)], spec)
        return function(*args, **kwargs)

    tensors = [v for v in values if isinstance(v, Tensor)]
    with among_fakes(tensors):
        graph = make_fx(run, pre_dispatch=True)(*(values[i] for i in places)).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(map(is_unsteady, calls)):
        return None
    numbers = dict(zip(graph.find_nodes(op="placeholder"), map(_Place, places), strict=True))
    parts = [node for node in calls if node.target is operator.getitem]
    calls = [node for node in calls if node.target is not operator.getitem]
    if len(calls) == 1 and isinstance(calls[0].target, torch._ops.OpOverload):
        kind = _one_call(calls[0], numbers)
        if kind is not None and (parts or calls[0] in tree_leaves(graph.output_node().args)):
            return kind
    leaves = [_Place(i) if i in places else v for i, v in enumerate(values)]
    return _Kind(name_of(function), (*leaves, spec))


def _one_call(node: fx.Node, numbers: dict[fx.Node, _Place]) -> _Kind | None:
    """Its arguments in the schema's order, without those at its end that are the defaults; None if
    one is neither the caller's nor a constant."""
    op: Any = node.target
    ranks = {a.meta["val"].dim() for a in numbers if isinstance(a.meta.get("val"), Tensor)}
    rank = ranks.pop() if len(ranks) == 1 else None  # broadcast, dims count another one's
    given = dict(zip((a.name for a in op._schema.arguments), node.args, strict=False))
    given |= node.kwargs
    name, _, overload = str(op).rpartition(".")
    word, found, kept = f"{_SAME_AS.get(name, name)}.{overload}", [], 0
    for argument in op._schema.arguments:
        value = given.get(argument.name, argument.default_value)
        leaves = value if _holds_nodes(value) else [value]
        if leaves is value:
            word += f"[{len(leaves)}]"
        if any(isinstance(leaf, fx.Node) and leaf not in numbers for leaf in leaves):
            return None
        for leaf in leaves:
            place = numbers.get(leaf) if isinstance(leaf, fx.Node) else None
            found.append(place or _literal(leaf, argument, node, rank))
        if argument.name in given and value != argument.default_value:
            kept = len(found)
    return _Kind(word, tuple(found[:kept]))


def _holds_nodes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, fx.Node) for v in value)


def _literal(value: Any, argument: Any, node: fx.Node, rank: int | None) -> Any:
    """One spelling of a number: dims from 0 on; of a float tensor's operand, a float."""
    op: Any = node.target
    name = op._schema.name
    if rank is not None and argument.name == "dim" and name not in _COUNT_NEW_DIM:
        if type(value) is int and value < 0:
            return value + rank
        if isinstance(value, (tuple, list)) and all(type(d) is int for d in value):
            return tuple(d + rank if d < 0 else d for d in value)
    result = node.meta.get("val")
    floats = isinstance(result, Tensor) and result.dtype.is_floating_point
    if floats and type(value) is int and str(argument.type) in ("Tensor", "number"):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def is_unsteady(node: fx.Node) -> bool:
    """Whether a call writes into an argument or draws random numbers."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return op._schema.is_mutable
    names = [argument.name for argument in op._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("train", True) is False:  # of dropout, in a model that is evaluated
        return False
    chance = given.get("dropout_p", 0.0) if "dropout_p" in names else given.get("p")
    return chance is None or bool(chance > 0)


def name_of(function: Any) -> str:
    """``torch.nn.functional.normalize``, ``Tensor.contiguous``."""
    name = getattr(function, "__name__", str(function))
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else f"Tensor.{name}"


@contextlib.contextmanager
def among_fakes(tensors: Sequence[Tensor]) -> Iterator[None]:
    """New tensors are fake, like these; sizes that depend on data are not counted as new ones."""
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield
