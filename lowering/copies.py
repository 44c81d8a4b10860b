"""Copies of what lies in a graph's own memory, for whoever keeps it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from .private import allocator

_empty = functools.cache(allocator)

#: tensors that are copied one by one
FEW = 4
ALIGNMENT = 16  # bytes


def alias(result: Any) -> Any:
    """Another tensor of the same memory; this costs the host less than a view."""
    return result.detach() if isinstance(result, torch.Tensor) else result


def own(*results: Any) -> list[Any]:
    """Copies that no replay writes over."""
    fresh, into, sources = list(results), [], []
    for k, result in enumerate(results):
        if not isinstance(result, torch.Tensor):
            continue
        stride = result.stride()
        copy = fresh[k] = _empty(result.device)((*result.size(),), stride, result.dtype)
        plain = 0 not in stride
        into.append(copy if plain else once(copy))
        sources.append(result if plain else once(result))
    if len(into) <= FEW:  # the kernel of many tensors has few programs for one
        for to, source in zip(into, sources, strict=True):
            to.copy_(source)
    else:
        torch._foreach_copy_(into, sources)
    return fresh


def own_together(*results: Any) -> list[Any]:
    """The same, where some share memory: so do their copies."""
    found, shared = list(results), defaultdict(list)
    for k, result in enumerate(results):
        if isinstance(result, torch.Tensor) and result.numel():
            shared[result.untyped_storage().data_ptr()].append(k)
    alone = [places[0] for places in shared.values() if len(places) == 1]
    copies = [(alone, own(*(results[k] for k in alone)))]
    copies += [(ks, _copied([results[k] for k in ks])) for ks in shared.values() if len(ks) > 1]
    for places, fresh in copies:
        for k, copy in zip(places, fresh, strict=True):
            found[k] = copy
    return found


def _copied(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of one storage, copied with what lies between them."""
    begins = [t.storage_offset() * t.itemsize for t in tensors]
    ends = [b + span_of(t) * t.itemsize for b, t in zip(begins, tensors, strict=True)]
    low = min(begins) // ALIGNMENT * ALIGNMENT
    bytes_of = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    fresh = bytes_of.set_(tensors[0].untyped_storage(), low, (max(ends) - low,), (1,)).clone()
    return [
        torch.empty(0, dtype=t.dtype, device=t.device).set_(
            fresh.untyped_storage(), (b - low) // t.itemsize, t.size(), t.stride()
        )
        for b, t in zip(begins, tensors, strict=True)
    ]


def span_of(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))


def once(tensor: torch.Tensor, strides: Sequence[int] | None = None) -> torch.Tensor:
    """Each element once: of an axis that repeats one, by ``strides`` or its own, the first. A copy
    into a tensor is one into this: ATen writes no element twice."""
    for axis, stride in enumerate(tensor.stride() if strides is None else strides):
        if stride == 0 and tensor.size(axis) > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor
