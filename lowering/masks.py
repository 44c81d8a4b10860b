"""Attention masks that torch's fused attention kernels can read.

Under tracing, libraries hand ``scaled_dot_product_attention`` masks that are expanded from a few
elements. A mask whose last stride is not 1 makes torch choose the unfused algorithm (in float32,
with the whole score matrix in memory); a copy of the mask costs far less.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node


def lay_out_masks(gm: GraphModule) -> int:
    """Copy such masks in a Dynamo graph, once each; returns how many."""
    copies: dict[Node, Node] = {}
    attention = torch.nn.functional.scaled_dot_product_attention
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not attention:
            continue
        given = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        if not isinstance(given, Node) or not _needs_copy(given):
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
    if not isinstance(example, torch.Tensor) or example.requires_grad or example.ndim < 2:
        return False
    stride, length = example.stride(-1), example.shape[-1]
    return isinstance(stride, int) and isinstance(length, int) and stride != 1 and length > 1
