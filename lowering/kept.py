"""Weights in another layout: converted once, kept while the weight is there and the same."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .channels_last import WEIGHT
from .private import static_inputs

#: in a clone's meta: its result is kept
KEPT = "gems_kept"


def keep_weights(gm: GraphModule) -> list[Node]:
    """The clones of an inference graph that are kept between its calls: those of parameters."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    static = {placeholders[k] for k in static_inputs() if k < len(placeholders)}
    found = [n for n in gm.graph.nodes if n.meta.get(WEIGHT) and n.args[0] in static]
    for node in found:
        node.meta[KEPT] = True
    return found


class _Kept:
    """A converted weight, and what it was made of."""

    __slots__ = ("address", "converted", "storage", "version", "weight")

    def __init__(self, weight: torch.Tensor, converted: torch.Tensor) -> None:
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: _kept.pop(key, None))
        # held weakly, so that no other storage takes its place in memory
        self.storage = weakref.ref(weight.untyped_storage())
        self.address, self.version = weight.data_ptr(), weight._version
        self.converted = converted

    def is_of(self, weight: torch.Tensor) -> bool:
        return (
            self.weight() is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.storage() is weight.untyped_storage()
        )


_kept: dict[int, _Kept] = {}  # by the weight's id: all graphs share what is converted


def kept_in_channels_last(*weights: torch.Tensor) -> list[Any]:
    """Every weight in channels-last, converted if it is new, was written, or is another tensor.

    What torch does not count as a write is not seen: through ``.data``, or by a CUDA graph. While
    one is captured, each weight is converted by the graph, which then sees later writes.
    """
    capturing = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
    found, fresh = [], False
    for weight in weights:
        if capturing or weight.is_inference():  # which has no count of writes
            found.append(weight.clone(memory_format=torch.channels_last))
            continue
        known = _kept.get(id(weight))
        if known is None or not known.is_of(weight):
            known = _Kept(weight, weight.detach().clone(memory_format=torch.channels_last))
            _kept[id(weight)] = known
            fresh = True
        found.append(known.converted)
    if fresh and weights[0].is_cuda:
        torch.cuda.current_stream(weights[0].device).synchronize()  # others may read it next
    return found
