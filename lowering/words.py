"""Words: what a node computes, whichever way it is spelt, for the patterns of ``rewrite.py``.

torch.matmul(a, b), a @ b, a.matmul(b), torch.bmm(a, b), view(bmm(view(a), view(b)))  -> matmul
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .graph import all_same, is_tensor, same, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """One node as a word: its arguments in the word's order, and what else it stands for.

    ``inside`` are further nodes that belong to the op (the views around a bmm). ``in_place`` ops
    write into their first argument.
    """

    word: str
    args: tuple[Any, ...]
    in_place: bool = False
    inside: tuple[fx.Node, ...] = ()


# word -> names of the arguments that it keeps (alternatives with |), and those that do not matter
_SIGNATURES: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "matmul": (("input|self", "other|mat2|tensor2"), frozenset()),
    "softmax": (("input|self", "dim"), frozenset({"dtype", "_stacklevel"})),
    "mul": (("input|self", "other"), frozenset()),
    "div": (("input|self", "other"), frozenset()),
    "add": (("input|self", "other"), frozenset()),
    "masked_fill": (("input|self", "mask", "value"), frozenset()),
    "where": (("condition", "input|self", "other"), frozenset()),
    "square": (("input|self",), frozenset()),
    "pow": (("input|self", "exponent"), frozenset()),
    "mean": (("input|self", "dim", "keepdim"), frozenset()),
    "rsqrt": (("input|self",), frozenset()),
    "transpose": (("input|self", "dim0", "dim1"), frozenset()),
    "dropout": (("input|self", "p", "training|train"), frozenset({"inplace"})),
    "topk": (("input|self", "k", "dim", "largest", "sorted"), frozenset()),
    "linear": (("input", "weight", "bias"), frozenset()),
    "cross_entropy": (
        ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction",
         "label_smoothing"),
        frozenset(),
    ),
}  # fmt: skip
_DEFAULTS = {
    ("dropout", 1): 0.5, ("dropout", 2): True, ("mean", 2): False, ("softmax", 1): None,
    ("topk", 2): -1, ("topk", 3): True, ("topk", 4): True, ("linear", 2): None,
    ("cross_entropy", 2): None, ("cross_entropy", 3): None, ("cross_entropy", 4): -100,
    ("cross_entropy", 5): None, ("cross_entropy", 6): "mean", ("cross_entropy", 7): 0.0,
}  # fmt: skip
# words whose further positional arguments do not matter
_OPEN = frozenset({"softmax", "dropout"})

_FUNCTIONS: dict[Any, str] = {
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    operator.matmul: "matmul",
    torch.softmax: "softmax",
    F.softmax: "softmax",
    torch.special.softmax: "softmax",
    torch.mul: "mul",
    torch.multiply: "mul",
    operator.mul: "mul",
    torch.div: "div",
    torch.divide: "div",
    torch.true_divide: "div",
    operator.truediv: "div",
    torch.add: "add",
    operator.add: "add",
    torch.masked_fill: "masked_fill",
    torch.where: "where",
    torch.square: "square",
    torch.pow: "pow",
    operator.pow: "pow",
    torch.mean: "mean",
    torch.rsqrt: "rsqrt",
    torch.transpose: "transpose",
    torch.dropout: "dropout",
    F.dropout: "dropout",
    torch.topk: "topk",
    F.linear: "linear",
    F.cross_entropy: "cross_entropy",
}
_IN_PLACE_FUNCTIONS: dict[Any, str] = {
    operator.iadd: "add",
    operator.imul: "mul",
    operator.itruediv: "div",
}
_METHODS = {
    "matmul": "matmul",
    "bmm": "matmul",
    "__matmul__": "matmul",
    "softmax": "softmax",
    "mul": "mul",
    "multiply": "mul",
    "div": "div",
    "true_divide": "div",
    "add": "add",
    "masked_fill": "masked_fill",
    "square": "square",
    "pow": "pow",
    "mean": "mean",
    "rsqrt": "rsqrt",
    "transpose": "transpose",
    "topk": "topk",
}
_IN_PLACE_METHODS = {"add_": "add", "mul_": "mul", "div_": "div", "masked_fill_": "masked_fill"}
_RESHAPING = frozenset({"view", "reshape", "flatten", "contiguous"})
_CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})


def read_dynamo(node: fx.Node) -> Reading | None:
    """The word of a node of a Dynamo graph, None if it has none."""
    target: Any = node.target
    if node.op == "call_function":
        if target is operator.getitem:
            return _read_part(node)
        word = _FUNCTIONS.get(target) if _is_hashable(target) else None
        in_place = word is None and target in _IN_PLACE_FUNCTIONS
        word = _IN_PLACE_FUNCTIONS[target] if in_place else word
    elif node.op == "call_method":
        if target in _CASTS:
            return _read_cast(node)
        if target in _RESHAPING:
            return _read_reshape(node)
        word, in_place = _METHODS.get(target), target in _IN_PLACE_METHODS
        word = _IN_PLACE_METHODS[target] if in_place else word
    else:
        return None
    args = None if word is None else _arguments(node, word)
    return None if word is None or args is None else _normal(node, word, args, in_place)


def _is_hashable(target: Any) -> bool:
    return getattr(target, "__hash__", None) is not None


def _arguments(node: fx.Node, word: str) -> tuple[Any, ...] | None:
    """The word's arguments, positional or by name; None if the call says something else too."""
    names, ignored = _SIGNATURES[word]
    if len(node.args) > len(names) and word not in _OPEN:
        return None
    given, args = dict(node.kwargs), list(node.args[: len(names)])
    for i in range(len(args), len(names)):
        name = next((n for n in names[i].split("|") if n in given), None)
        if name is not None:
            args.append(given.pop(name))
        elif (word, i) in _DEFAULTS:
            args.append(_DEFAULTS[word, i])
        else:
            return None
    return None if set(given) - ignored else tuple(args)


def _normal(node: fx.Node, word: str, args: tuple[Any, ...], in_place: bool) -> Reading | None:
    if word != "topk" and not is_tensor(value_of(node)):  # that returns two
        return None
    if word == "pow":
        if type(args[1]) not in (int, float) or args[1] != 2:
            return None
        return Reading("square", args[:1])
    if word == "matmul" and node.target in (torch.bmm, "bmm") and len(value_of(node).shape) != 3:
        return None
    return Reading(word, args, in_place)


def _read_cast(node: fx.Node) -> Reading | None:
    """A cast changes the dtype and nothing else; what it asks for is read off its result."""
    source: Any = node.args[0]
    old, new = value_of(source), value_of(node)
    if is_tensor(old) and is_tensor(new) and old.device == new.device:
        return Reading("cast", (source,))
    return None


def _read_reshape(node: fx.Node) -> Reading | None:
    """Rows are laid out anew, the last dim stays."""
    source: Any = node.args[0]
    old, new = value_of(source), value_of(node)
    if not (is_tensor(old) and is_tensor(new) and old.dim() and new.dim()):
        return None
    return Reading("reshape", (source,)) if same(old.shape[-1], new.shape[-1]) else None


def _read_part(node: fx.Node) -> Reading | None:
    """Some of the rows of each matrix: ``x[..., :-1, :]``."""
    source, index = node.args
    if not isinstance(index, tuple) or len(index) != 3 or index[0] is not Ellipsis:
        return None
    bounds = (index[1].start, index[1].stop, index[1].step) if type(index[1]) is slice else (node,)
    if index[2] != slice(None) or any(type(b) is not int and b is not None for b in bounds):
        return None
    return Reading("part", (source, index))


_ATEN: dict[Any, tuple[str, int]] = {  # overload -> word, how many arguments the word keeps
    aten.mul.Tensor: ("mul", 2),
    aten.mul.Scalar: ("mul", 2),
    aten.div.Tensor: ("div", 2),
    aten.div.Scalar: ("div", 2),
    aten.add.Tensor: ("add", 2),
    aten._softmax.default: ("softmax", 2),
    aten.masked_fill.Scalar: ("masked_fill", 3),
    aten.where.self: ("where", 3),
    aten.where.ScalarOther: ("where", 3),
    aten.pow.Tensor_Scalar: ("pow", 2),
    aten.mean.dim: ("mean", 3),
    aten.rsqrt.default: ("rsqrt", 1),
    aten.transpose.int: ("transpose", 3),
    aten.bmm.default: ("matmul", 2),
    aten._to_copy.default: ("cast", 1),
}
_RESHAPES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.clone.default}
)


def read_aten(node: fx.Node) -> Reading | None:
    """The word of a node of an ATen graph, None if it has none."""
    if node.op != "call_function":
        return None
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return _read_batched_matmul(node)
    if node.target is aten.permute.default:
        return _read_permute(node)
    word, count = _ATEN.get(node.target, (None, 0))
    if word is None or len(node.args) > count + (word == "softmax"):
        return None
    if word == "cast":
        return _read_cast(node)
    if node.kwargs:  # alpha, rounding_mode, dtype
        return None
    args = node.args[:count]
    if word == "mean" and len(args) == 2:
        args = (*args, False)
    if word == "where" and len(args) == 3:
        args = (*args[:2], _number(args[2]))
    return _normal(node, word, args, False) if len(args) == count else None


def _number(value: Any) -> Any:
    """The number that a 0-d constant holds; anything else as it is."""
    if isinstance(value, fx.Node):
        if value.target is aten.scalar_tensor.default:
            return value.args[0]
        if value.target is aten.full.default and not value.args[0]:
            return value.args[1]
    return value


def _read_permute(node: fx.Node) -> Reading | None:
    args: Any = node.args
    source, order = args[0], list(args[1])
    last = len(order) - 1
    if last < 1 or [d % len(order) for d in order] != [*range(last - 1), last, last - 1]:
        return None
    return Reading("transpose", (source, -2, -1))


def _read_batched_matmul(node: fx.Node) -> Reading | None:
    """``view(bmm(view(expand(a)), view(expand(b))))``, which is what matmul in 4-D becomes."""
    product: Any = node.args[0]
    value = value_of(node)
    if product.target is not aten.bmm.default or len(product.users) != 1 or value.dim() < 3:
        return None
    if not all_same(value.shape[-2:], value_of(product).shape[-2:]):
        return None
    inside, operands = [product], []
    for operand in product.args:
        wanted = (*value.shape[:-2], *value_of(operand).shape[-2:])
        path: list[Any] = []
        found: tuple[Any, int] | None = None
        while True:
            if all_same(value_of(operand).shape, wanted):
                found = operand, len(path)
            if operand.target not in _RESHAPES or len(operand.users) != 1:
                break
            path.append(operand)
            operand = operand.args[0]
        if found is None:
            return None
        operands.append(found[0])
        inside += path[: found[1]]
    return Reading("matmul", tuple(operands), False, tuple(inside))
