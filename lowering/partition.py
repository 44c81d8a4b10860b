"""The joint graph -> forward and backward: torch's min-cut partitioner, told what we know."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..kernels import load_ops
from ..kernels.op import OPS
from . import private
from .batch_norm import APPLY, take_batch_norms_apart
from .channels_last import Decision, decide
from .conv_bias import take_biases_apart
from .graph import RETURNED, calls_of, output_node, viewed
from .images import take_images
from .options import Options
from .overload import name_of
from .packed import pack_saved
from .passes import drop_duplicates
from .pooling import take_poolings
from .products import align_products
from .strided_convolutions import take_strided


def partition(
    joint: GraphModule,
    inputs: Sequence[Any],
    options: Options | None = None,
    decided: Callable[[Decision], None] = lambda decision: None,
    **how: Any,
) -> tuple[Any, Any]:
    """min_cut_rematerialization_partition; dropout masks are drawn again, their seed is saved.

    ``decided`` is told which layout convolutions have, in both graphs.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch.utils.checkpoint import CheckpointPolicy

    share_seeds(joint)
    if options is not None:
        decided(decide(joint, options))
        take_biases_apart(joint, options)
        take_images(joint, options.target)
    take_strided(joint)
    align_products(joint)  # before it is split: what is saved for backward keeps its rows
    take_batch_norms_apart(joint)
    take_poolings(joint)
    for node in joint.graph.nodes:
        if _is(node, "gems.seed.default"):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif _is(node, "gems.dropout_mask.default"):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta.setdefault("ac_graph_id", 0)
    how.setdefault("compiler", "inductor")
    drop_duplicates(joint, returned=False)
    with private.known_to_partitioner(*declared()), private.duplicates_are_gone():
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **how)
    if inputs:  # else both are subgraphs of others
        pack_saved(forward, backward, how["num_fwd_outputs"])
    mark_returned(forward, backward, how["num_fwd_outputs"])
    return forward, backward


def mark_returned(forward: GraphModule, backward: GraphModule, visible: int) -> int:
    """Mark what backward reads of forward's first ``visible`` results, which are the program's (a
    model's logits): it lives as long as the program wishes, not until its last use. How many."""
    results: Any = output_node(forward.graph).args[0]
    theirs = {viewed(n) for n in results[:visible] if isinstance(n, Node)}
    names = {n.name for n in results[visible:] if isinstance(n, Node) and viewed(n) in theirs}
    marked = [n for n in backward.graph.find_nodes(op="placeholder") if n.name in names]
    for node in marked:
        node.meta[RETURNED] = True
    return len(marked)


@functools.cache
def declared() -> tuple[frozenset[Any], frozenset[Any], frozenset[Any]]:
    """(ops that cost nothing to recompute inside a kernel, all that kernels take in, views)."""
    load_ops()
    found: dict[str, set[Any]] = {"pointwise": set(), "reduction": set(), "composite": set()}
    for name, op in OPS.items():
        space, packet, _ = name.split(".")
        target = getattr(getattr(torch.ops, space), packet, None)
        if target is not None:
            found["pointwise" if name == APPLY else op.kind].add(target)
    views = frozenset({torch.ops.aten.transpose, torch.ops.aten.detach})
    return frozenset(found["pointwise"]), frozenset().union(*found.values()), views


def share_seeds(gm: GraphModule) -> int:
    """Draw one seed a device and run, and give every mask a salt of its own; returns how many."""
    first: dict[Any, Node] = {}
    for node in calls_of(gm.graph, (torch.ops.gems.seed.default,)):
        known = first.setdefault(node.args[0], node)
        if known is not node:
            node.replace_all_uses_with(known)
            gm.graph.erase_node(node)
    salt = 0
    for node in calls_of(gm.graph, (torch.ops.gems.dropout_mask.default,)):
        if node.args[3] == 0:
            salt += 1
            node.args = (*node.args[:3], salt)
    if salt:
        gm.recompile()
    return salt


def _is(node: Node, name: str) -> bool:
    return name_of(node.target) == name
