"""Bags of an embedding: sums, means and largest elements of rows of a table. Their kernels are
written as a whole, by ``lowering.bag_kernels``.

Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

from typing import Any

#: modes, as ATen numbers them
SUM, MEAN, MAX = 0, 1, 2


def define(library: Any) -> None:
    """Register these on a torch Library. Bag b holds ``indices`` [N] from offsets[b] on, up to
    those of the next one; the first begins with all, the last of ``bags`` ends with them. Indices
    that are ``padding`` do not count, nor those of no row of the table.

    embedding_bags: weight [V, D] -> [bags, D]; each row is multiplied by its ``scales`` [N] first.
                    Of an empty bag 0. The mode MAX tells the index of each largest element, the
                    first of equal ones: integers; of an empty bag -1
    bag_sizes:      how many count, [bags]
    bag_of_each:    the bag of each index, [N]
    """
    import torch

    tags = (torch.Tag.pt2_compliant_tag,)
    library.define(
        "embedding_bags(Tensor weight, Tensor indices, Tensor offsets, Tensor? scales, int mode,"
        " int padding, int bags) -> Tensor",
        tags=tags,
    )
    library.define(
        "bag_sizes(Tensor indices, Tensor offsets, int padding, int bags) -> Tensor", tags=tags
    )
    library.define("bag_of_each(Tensor indices, Tensor offsets, int bags) -> Tensor", tags=tags)
    library.impl("embedding_bags", _bags, "CompositeExplicitAutograd")
    library.impl("bag_sizes", _sizes, "CompositeExplicitAutograd")
    library.impl("bag_of_each", _bag_of_each, "CompositeExplicitAutograd")
    torch.library.register_fake("gems::embedding_bags", _room, lib=library)
    torch.library.register_fake(
        "gems::bag_sizes", lambda indices, *how: indices.new_empty(how[-1]), lib=library
    )
    torch.library.register_fake(
        "gems::bag_of_each", lambda indices, *how: torch.empty_like(indices), lib=library
    )


def _room(
    weight: Any, indices: Any, offsets: Any, scales: Any, mode: int, padding: int, bags: int
) -> Any:
    made = indices if mode == MAX else weight
    return made.new_empty((bags, weight.shape[1]))


def _bags(
    weight: Any, indices: Any, offsets: Any, scales: Any, mode: int, padding: int, bags: int
) -> Any:
    import torch

    out = _room(weight, indices, offsets, scales, mode, padding, bags)
    found = torch.ops.aten._embedding_bag(
        weight, indices, offsets[:bags], False, mode, False, scales, False, padding
    )
    if mode != MAX:
        return out.copy_(found[0])
    empty = _sizes(indices, offsets, padding, bags)[:, None] == 0
    return out.copy_(torch.where(empty, -1, found[3]))


def _sizes(indices: Any, offsets: Any, padding: int, bags: int) -> Any:
    counts = (indices != padding).to(indices.dtype)
    whose = _bag_of_each(indices, offsets, bags)
    return indices.new_zeros(bags).index_add(0, whose, counts)


def _bag_of_each(indices: Any, offsets: Any, bags: int) -> Any:
    import torch

    ends = torch.cat([offsets[1:bags], offsets.new_full((1,), indices.shape[0])])
    places = torch.arange(indices.shape[0], device=indices.device)
    return torch.searchsorted(ends.long(), places, right=True).to(indices.dtype)
