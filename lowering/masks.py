"""Attention masks in a Dynamo graph: constant ones are read, the others laid out for fast kernels.

Under tracing, libraries hand ``scaled_dot_product_attention`` a mask where in eager mode they see
that none is needed. Such a mask is a chain of aranges and comparisons without any input, so it can
be computed while compiling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from .graph import module_path, source_line, value_of
from .rewrite import (
    Fired,
    NearMiss,
    RewriteLog,
    Write,
    is_barrier,
    is_body_call,
    is_foreign,
    unwritten,
)

log = logging.getLogger("gems_compile")

#: elements that computing one constant mask may take in all; 4 x 2048 x 2048 takes 2**26
MOST_ELEMENTS = 2**28

#: functions and methods of which a mask is made: pure, and without random numbers
_NAMES = """
arange ones zeros full ones_like zeros_like full_like new_ones new_zeros new_full tensor
scalar_tensor le lt ge gt eq ne add sub rsub mul neg floordiv floor_divide abs minimum maximum
clamp and and_ or or_ xor invert bitwise_and bitwise_or bitwise_not
logical_and logical_or logical_not logical_xor getitem expand expand_as broadcast_to view
reshape unsqueeze squeeze permute transpose flatten contiguous clone to bool int long float half
bfloat16 type type_as cumsum diff tril triu where masked_fill cat stack repeat
"""
_CONSTANT = frozenset(_NAMES.split())


def attention_calls(gm: GraphModule) -> list[Node]:
    """Calls of scaled_dot_product_attention."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target is attention]


def sdpa_masks(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """(call of scaled_dot_product_attention, its mask) wherever the mask is a node."""
    for node in attention_calls(gm):
        mask = _argument(node, 3, "attn_mask")
        if isinstance(mask, Node):
            yield node, mask


def _given_masks(gm: GraphModule) -> Iterator[tuple[Node, Node]]:
    """``sdpa_masks``; of calls inside a checkpoint's body, the node that the body is given."""
    yield from sdpa_masks(gm)
    for call in list(gm.graph.nodes):
        if not is_body_call(call):
            continue
        body = getattr(gm, str(call.args[0].target), None)
        if not isinstance(body, GraphModule) or len(call.args[0].users) != 1:
            continue
        inner = body.graph.find_nodes(op="placeholder")
        given = dict(zip(inner, call.args[len(call.args) - len(inner) :], strict=True))
        for node, mask in sdpa_masks(body):
            outer = given.get(mask)
            if isinstance(outer, Node) and not _may_be_written({mask: None}):
                yield node, outer


def _argument(node: Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


# constant masks -----------------------------------------------------------------------------------


def read_constant_masks(gm: GraphModule, write: Write = unwritten) -> RewriteLog:
    """Drop masks that hide nothing, and say ``is_causal`` for those that hide the future.

    The kernels then read no mask, and skip half of the scores when it was causal.
    """
    found = RewriteLog()
    known: dict[Node, str | None] = {}
    if any(map(is_foreign, gm.graph.nodes)):
        return found
    changed: set[Any] = set()
    for node, mask in _given_masks(gm):
        if _argument(node, 5, "is_causal"):
            continue
        if mask not in known:
            known[mask] = _kind_of(mask)
        kind, where = known[mask], (source_line(node), module_path(node))
        if kind is None:
            continue
        if kind == "other":
            why = "the constant mask hides something else than the future"
            found.near_misses.append(NearMiss("constant_mask", node.name, why, *where))
            continue
        before = write([node])
        _take_mask_away(node, causal=kind == "causal")
        changed.add(node.graph.owning_module)
        because = "no mask is read" if kind == "all" else "no mask is read, half of the scores go"
        fired = Fired("constant_mask", because, 1, 1, *where, before, write([node]))
        found.fired.append(fired)
    for mask in known:
        _erase_unread(gm, mask)
    for module in changed | ({gm} if changed else set()):
        module.recompile()
    return found


def _take_mask_away(node: Node, causal: bool) -> None:
    kwargs = {name: v for name, v in node.kwargs.items() if name != "attn_mask"}
    args = list(node.args)
    if len(args) > 3:
        args[3] = None
    if causal and len(args) > 5:
        args[5] = True
    elif causal:
        kwargs["is_causal"] = True
    node.args, node.kwargs = tuple(args), kwargs


def _erase_unread(gm: GraphModule, mask: Node) -> None:
    """The mask and what only it was made of."""
    if mask.users or mask.op == "placeholder":
        return
    sources = mask.all_input_nodes
    gm.graph.erase_node(mask)
    for source in sources:
        if not source._erased and _is_constant_op(source):
            _erase_unread(gm, source)


def _kind_of(mask: Node) -> str | None:
    """What a constant mask shows: "all", "causal" or "other"; None of one that is no constant."""
    cone = _constant_cone(mask)
    if cone is None:
        return None
    try:
        with _disable_current_modes(), torch.no_grad():
            return _classify(_evaluate(cone))
    except Exception as error:  # it stays a mask
        log.info("mask %s is not read: %s: %s", mask.name, type(error).__name__, error)
        return None


def _constant_cone(mask: Node) -> list[Node] | None:
    """The nodes that make the mask, in order, if they need no input and nobody writes them."""
    cone: dict[Node, None] = {}
    elements, stack = 0, [mask]
    while stack:
        node = stack.pop()
        if node in cone:
            continue
        if not _is_constant_op(node):
            return None
        value = value_of(node)
        if isinstance(value, Tensor):
            if not all(type(n) is int for n in value.shape):
                return None
            elements += value.numel()
        cone[node] = None
        stack.extend(node.all_input_nodes)
    if elements > MOST_ELEMENTS or _may_be_written(cone):
        return None
    places = {node: place for place, node in enumerate(mask.graph.nodes)}
    return sorted(cone, key=places.__getitem__)


def _is_constant_op(node: Node) -> bool:
    if node.op not in ("call_function", "call_method") or is_barrier(node):
        return False
    target: Any = node.target
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    if name.startswith("__") and name.endswith("__"):  # a == b is a method in some versions
        name = name[2:-2]
    return name in _CONSTANT


def _may_be_written(cone: dict[Node, None]) -> bool:
    """Whether something that may share memory with a node of the cone is written."""
    attention = torch.nn.functional.scaled_dot_product_attention
    seen: set[Node] = set()
    stack = list(cone)
    while stack:
        for user in stack.pop().users:
            if is_barrier(user):
                return True
            if user not in seen and user.target is not attention and user.op != "output":
                seen.add(user)
                stack.append(user)
    return False


def _evaluate(cone: list[Node]) -> Tensor:
    values: dict[Node, Any] = {}
    for node in cone:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        call: Callable[..., Any] = (
            getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target  # type: ignore[assignment]
        )
        values[node] = call(*args, **kwargs)
    return values[cone[-1]]


def _classify(mask: Tensor) -> str:
    seen = mask if mask.dtype == torch.bool else mask == 0
    if bool(seen.all()):
        return "all"
    length = mask.shape[-1]
    if mask.ndim < 2 or mask.shape[-2] != length:
        return "other"
    past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if not bool((seen == past).all()):
        return "other"
    if mask.dtype == torch.bool:
        return "causal"
    # an addend below every score leaves no weight, as is_causal's minus infinity does
    hidden = mask <= torch.finfo(mask.dtype).min
    return "causal" if bool((hidden == ~past).all()) else "other"


# masks of run time --------------------------------------------------------------------------------


def lay_out_masks(gm: GraphModule) -> int:
    """Copy masks that are expanded from a few elements, once each; returns how many.

    A mask whose last stride is not 1 makes torch choose the unfused algorithm (in float32, with the
    whole score matrix in memory); a copy of the mask costs far less.
    """
    copies: dict[Node, Node] = {}
    for node, given in sdpa_masks(gm):
        if not _needs_copy(given):
            continue
        if given not in copies:
            with gm.graph.inserting_before(node):
                copies[given] = gm.graph.call_method("contiguous", (given,))
            copies[given].meta = dict(given.meta)
            example = given.meta["example_value"]
            copies[given].meta["example_value"] = example.contiguous()
        node.replace_input_with(given, copies[given])
    if copies:
        gm.recompile()
    return len(copies)


def _needs_copy(mask: Node) -> bool:
    example = mask.meta.get("example_value")
    if not isinstance(example, Tensor) or example.requires_grad or example.ndim < 2:
        return False
    stride, length = example.stride(-1), example.shape[-1]
    return isinstance(stride, int) and isinstance(length, int) and stride != 1 and length > 1
