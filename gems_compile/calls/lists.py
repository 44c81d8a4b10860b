"""Multi-tensor ops in eager mode, ``_foreach_add`` and its like: those whose op on one tensor is
declared. The compiler takes them apart (``lowering.foreach``), and one launch serves many tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import load_ops
from ..lowering.foreach import single_op
from ..lowering.overload import find_overload
from .forms import Form

COPIES = ("_foreach_clone", "_foreach_copy")


@functools.cache
def foreach() -> tuple[str, ...]:
    """The overloads that return lists, as torch prints them; each torch has others.

    Not those of lists of numbers, which ATen's kernels are given and ours are compiled for, nor
    copies, of which a kernel of ours computes nothing.
    """
    load_ops()
    found = []
    for spelt in sorted(torch._C._dispatch_get_all_op_names()):  # dir(aten) knows those used so far
        base, _, which = spelt.removeprefix("aten::").partition(".")
        if not spelt.startswith("aten::_foreach_") or base in COPIES or which == "ScalarList":
            continue
        overload = find_overload(f"aten.{base}.{which or 'default'}")
        if overload is None or overload._schema.is_mutable:
            continue
        if overload in RULES or single_op(overload) is not None:
            found.append(str(overload))
    return tuple(found)


def count_versions(form: Form, written: Sequence[Tensor]) -> None:
    """Tell autograd that tensors were written, where ATen's kernels do: not those of optimizers."""
    if form.functional is not form.overload:
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])


# those that the compiler does not take apart itself ----------------------------------------------


def foreach_norm(
    tensors: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None
) -> list[Tensor]:
    return [torch.linalg.vector_norm(t, ord, dtype=dtype) for t in tensors]


def foreach_zero(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) for t in tensors]


RULES = {
    torch.ops.aten._foreach_norm.Scalar: foreach_norm,
    torch.ops.aten._foreach_zero.default: foreach_zero,
}
