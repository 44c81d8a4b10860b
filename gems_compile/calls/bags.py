"""Rules of eager mode for bags of embeddings: see ``rules`` and ``kernels.bags``.

What ATen saves for backward it lays out in one way on a GPU, and in another on a CPU, where some of
it is empty or zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.bags import MAX, MEAN, SUM
from ..kernels.fused import register_torch_ops
from .whole import Whole, wide

aten, gems = torch.ops.aten, torch.ops.gems


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    forward_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Sum, mean or maximum of each bag's rows, the bag of each index, how many indices of a bag
    count, the index of each maximum)."""
    register_torch_ops()
    _check(weight, indices, offsets, per_sample_weights)
    bags = offsets.shape[0] - include_last_offset
    if bags < 1 or not indices.shape[0] or not weight.shape[1]:
        raise Whole("no bag, no index or no column")
    how = weight, indices, offsets, per_sample_weights, mode, padding_idx, bags
    made = gems.embedding_bags.default(*how)
    if mode == MAX:
        out = _picked(weight, made)
    else:
        out, made = made, indices.new_empty(0)
    sizes = _sizes(indices, offsets, padding_idx, bags)
    if as_a_gpu(indices):
        sizes = torch.nn.functional.pad(sizes, (0, int(include_last_offset)))
        return out, gems.bag_of_each.default(indices, offsets, bags), sizes, made
    fast = mode == SUM and padding_idx < 0 and weight.stride(1) == 1
    if per_sample_weights is not None:
        fast &= per_sample_weights.stride(0) == 1
    whose = indices.new_empty(0) if fast else gems.bag_of_each.default(indices, offsets, bags)
    if mode == MAX:
        return out, whose, sizes, made.clamp(min=0)
    if mode == SUM:
        sizes = sizes.new_zeros(offsets.shape[0] if forward_only else bags)
    return out, whose, sizes, sizes.clone()


def embedding_bag_forward_only(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return embedding_bag(*args, **{**kwargs, "forward_only": True})


def as_a_gpu(indices: Tensor) -> bool:
    """Whether results are those of ATen's kernel of a GPU, and not of its CPU's."""
    return indices.is_cuda


def _check(weight: Tensor, indices: Tensor, offsets: Tensor, scales: Tensor | None) -> None:
    if indices.ndim != 1 or indices.dtype != offsets.dtype:
        raise Whole("indices in rows, or of another dtype than the offsets")
    if scales is not None and scales.dtype != weight.dtype:
        raise Whole("weights of samples of another dtype than the table")


def _picked(weight: Tensor, rows: Tensor) -> Tensor:
    """[bags, D]: the elements of the table in those rows, 0 where there is none."""
    found = weight.gather(0, rows.clamp(min=0).long())
    return torch.where(rows >= 0, found, 0)


def _sizes(indices: Tensor, offsets: Tensor, padding: int, bags: int) -> Tensor:
    if padding >= 0:
        return gems.bag_sizes.default(indices, offsets, padding, bags)
    bag = torch.arange(bags, device=indices.device)
    begins = torch.where(bag == 0, 0, offsets[:bags])
    following = offsets[(bag + 1).clamp(max=offsets.shape[0] - 1)]
    return torch.where(bag == bags - 1, indices.shape[0], following) - begins


# gradients ---------------------------------------------------------------------------------------


def embedding_bag_dense_backward(
    grad: Tensor,
    indices: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    """The gradient of the table [num_weights, D]: that of a bag goes to each of its rows, or to
    where the maximum came from."""
    if scale_grad_by_freq:
        raise Whole("gradients by how often an index is there")
    if mode == MAX:
        known = (maximum_indices >= 0) & (bag_size[: grad.shape[0], None] > 0)
        rows = maximum_indices.clamp(min=0).long()
        zeros = grad.new_zeros((num_weights, grad.shape[1]))
        return zeros.scatter_add(0, rows, torch.where(known, grad, 0))
    if not offset2bag.shape[0]:
        raise Whole("the bags of the indices are not known")
    rows = grad.index_select(0, offset2bag)
    if per_sample_weights is not None:
        rows = wide(rows) * wide(per_sample_weights)[:, None]
    if mode == MEAN:
        rows = wide(rows) / bag_size.index_select(0, offset2bag)[:, None]
    rows = rows.to(grad.dtype)
    return aten.embedding_dense_backward.default(rows, indices, num_weights, padding_idx, False)


def embedding_bag_per_sample_weights_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    mode: int,
    padding_idx: int = -1,
) -> Tensor:
    """[N]: the product of a bag's gradient with each of its rows; 0 of padding."""
    if not offset2bag.shape[0]:
        offset2bag = gems.bag_of_each.default(indices, offsets, offsets.shape[0])
    given = wide(grad.index_select(0, offset2bag)) * wide(weight.index_select(0, indices))
    found = given.sum(1)
    if padding_idx >= 0:
        found = torch.where(indices == padding_idx, 0, found)
    return found.to(grad.dtype)


BAGS: dict[Any, Any] = {
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_forward_only.default: embedding_bag_forward_only,
    aten._embedding_bag_dense_backward.default: embedding_bag_dense_backward,
    aten._embedding_bag_per_sample_weights_backward.default: (
        embedding_bag_per_sample_weights_backward
    ),
}
#: what their rules call and the core reads, for it has an algorithm of its own
KEPT = (aten.embedding_dense_backward.default,)
