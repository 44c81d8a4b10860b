"""Grouped-query attention in a Dynamo graph: keys and values are not repeated for every query head.

Models write ``sdpa(q, repeat(k), repeat(v))`` where torch cannot be told of groups, or could not
when they were written. The fast kernels read each key once for its group of heads
(``enable_gqa=True``), with no copy in memory, none saved for backward, and no sum over the copies
in there. Where torch has no kernel that can, nothing changes.
"""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph import module_path, source_line, value_of
from .indexing import size_of
from .masks import attention_calls
from .rewrite import (
    Fired,
    NearMiss,
    RewriteLog,
    Write,
    bodies,
    is_barrier,
    is_foreign,
    unwritten,
)

log = logging.getLogger("gems_compile")

#: functions and methods that make the copy, in their order from its end
MERGE, SPREAD, ADD = (
    ("reshape", "view", "flatten"),
    ("expand", "broadcast_to"),
    ("getitem", "unsqueeze"),
)


def share_keys(gm: GraphModule, write: Write = unwritten) -> RewriteLog:
    """Hand keys and values to attention as they were before their heads were repeated."""
    found = RewriteLog()
    if any(map(is_foreign, gm.graph.nodes)):
        return found
    for node in attention_calls(gm):
        _share(node, found, write)
    if found.fired:
        gm.recompile()
    for body in bodies(gm):
        found.extend(share_keys(body, write))
    return found


def _share(node: Node, found: RewriteLog, write: Write) -> None:
    args = _arguments(node)
    key, value = args["key"], args["value"]
    single_key, single_value = _before_repeat(key), _before_repeat(value)
    if args["enable_gqa"] or single_key is None or single_value is None:
        return
    where = (source_line(node), module_path(node))
    why = _why_written((key, value), node) or _why_slower(
        {**args, "key": single_key, "value": single_value, "enable_gqa": True}, node
    )
    if why is not None:
        found.near_misses.append(NearMiss("grouped_query", node.name, why, *where))
        return
    old, texts = len(node.graph.nodes), _written(node, (key, value), write)
    node.args = (args["query"], single_key, single_value)
    node.kwargs = {
        name: args[name] for name in ("attn_mask", "dropout_p", "is_causal", "scale")
    } | {"enable_gqa": True}
    for repeated in (key, value):
        _erase_unread(repeated)
    gone = old - len(node.graph.nodes)
    because = "keys and values are read as they are, not repeated for every head"
    before = [t for n, text in texts.items() if n._erased or n is node for t in text]
    fired = Fired("grouped_query", because, gone + 1, 1, *where, tuple(before), write([node]))
    found.fired.append(fired)


def _written(node: Node, copies: tuple[Node, Node], write: Write) -> dict[Node, tuple[str, ...]]:
    """The text of a call of attention, and of all that may be erased with it, in order."""
    found = {node}
    for at in copies:
        while _operand(at, *MERGE, *SPREAD, *ADD) is not None:
            found.add(at)
            at = at.all_input_nodes[0]
    return {n: write([n]) for n in sorted(found)}


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of scaled_dot_product_attention by name."""
    default = dict(attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)
    names = ("query", "key", "value", *default)
    return {**default, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _why_written(copies: tuple[Node, Node], node: Node) -> str | None:
    """Why what was copied may no longer be there when attention reads it; None where it is."""
    left, at = set(copies), node
    while left:
        at = at.prev
        if is_barrier(at):
            return "something may be written between the copy of the keys and their use"
        left.discard(at)
    return None


def _why_slower(args: dict[str, Any], node: Node) -> str | None:
    """Why attention over groups is no gain; None where it is."""
    values = {k: value_of(v) if isinstance(v, Node) else v for k, v in args.items()}
    try:
        known = _has_kernel(**values)
    except Exception as error:  # it stays as the program wrote it
        log.info("%s: %s: %s", node.name, type(error).__name__, error)
        return "torch did not say whether it has a kernel for groups"
    return None if known else "torch has no kernel for groups of such operands"


def _has_kernel(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, **_: Any
) -> bool:
    """Whether torch has one that reads a key once for its group: FlashAttention, or cuDNN's. It
    then takes one of those, for the others do not accept groups."""
    if query.device.type != "cuda":
        return False
    backend = torch.backends.cuda
    with query.fake_mode:
        params = backend.SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, True)
        return backend.can_use_flash_attention(params) or backend.can_use_cudnn_attention(params)


def _before_repeat(node: Any) -> Node | None:
    """What ``reshape(expand(k[:, :, None]))`` repeats along its second dim; None of another."""
    merged = node
    spread = _operand(merged, *MERGE)
    single = _operand(spread, *SPREAD)
    source = _operand(single, *ADD)
    if source is None:
        return None
    merged_as, spread_as, single_as, shape = map(_shape, (merged, spread, single, source))
    if len(shape) != 4 or len(spread_as) != 5:
        return None
    batch, heads, *rest = shape
    times = spread_as[2]
    right = (
        single_as == [batch, heads, 1, *rest]
        and spread_as == [batch, heads, times, *rest]
        and merged_as == [batch, heads * times, *rest]
    )
    return source if right and _adds_a_dim(single) else None


def _operand(node: Any, *names: str) -> Node | None:
    """The first argument of a call of one of these functions or methods."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    target: Any = node.target
    name = target if node.op == "call_method" else getattr(target, "__name__", "")
    first = node.args[0] if node.args else None
    return first if name in names and isinstance(first, Node) else None


def _adds_a_dim(node: Any) -> bool:
    """Whether a getitem takes all there is, with one new dim; an unsqueeze does."""
    if node.target is not operator.getitem:
        return True
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)


def _shape(node: Any) -> list[Any]:
    value = value_of(node)
    return [size_of(n) for n in value.shape] if isinstance(value, Tensor) else []


def _erase_unread(node: Node) -> None:
    """A copy that nobody reads any more, and the views that only it read."""
    while not node.users and _operand(node, *MERGE, *SPREAD, *ADD) is not None:
        source = node.all_input_nodes[0]
        node.graph.erase_node(node)
        node = source
