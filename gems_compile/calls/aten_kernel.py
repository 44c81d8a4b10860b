"""Reaching ATen's own kernel of an overload from below the dispatcher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

aten = torch.ops.aten


def native_kernel(overload: torch._ops.OpOverload, key: str) -> Any:
    """The kernel that the dispatcher would call now; taken before ours is registered.

    ``OpOverload.redispatch`` would come back to ours, for there is no key below the device's.
    """
    kernel = torch.library.get_kernel(overload, key)
    return ByTensor(overload) if key == "CUDA" and overload in BY_TENSOR else kernel


# numbers on the device ---------------------------------------------------------------------------

#: Overloads of a number from which ATen's GPU kernels make a tensor on the device that still counts
#: as a number, and call another op with it. torch gives such a tensor to no kernel in Python: it
#: raises before that is called. -> (what is called instead, the place of the number)
BY_TENSOR = {
    aten.searchsorted.Scalar: (aten.searchsorted.Tensor, 1),
    aten.searchsorted.Scalar_out: (aten.searchsorted.Tensor_out, 1),
    aten.bucketize.Scalar: (aten.bucketize.Tensor, 0),
}
#: an overload that they call, and those that must not reach ATen's kernel while ours is behind it
CALLED_WITH_NUMBERS = {"aten._to_copy.default": tuple(map(str, BY_TENSOR))}
#: overloads that only such calls reach, and which stay ATen's for it: of ``2 ** x``
CALLED_WITH_NUMBERS_ALONE = frozenset({"aten.pow.Tensor_Tensor_out"})


class ByTensor:
    """A kernel that calls the overload for tensors, with a 0-d tensor of the dtype to which torch
    promotes the number."""

    def __init__(self, overload: torch._ops.OpOverload) -> None:
        self.overload, self.place = BY_TENSOR[overload]

    def call_boxed(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        among = given[1 - self.place]
        dtype = torch.result_type(among, given[self.place])
        given[self.place] = torch.full((), given[self.place], dtype=dtype, device=among.device)
        return self.overload(*given, **kwargs)


def companions(wanted: Iterable[str], key: str) -> frozenset[str]:
    """What has to be replaced beside ``wanted``, for ATen's kernels of it would fail."""
    found = [CALLED_WITH_NUMBERS.get(name, ()) for name in wanted] if key == "CUDA" else []
    return frozenset(itertools.chain.from_iterable(found))


class _Carrier:
    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return args[0].call()


def with_numbers_as_tensors(call: Callable[[], Any]) -> Any:
    """Run ``call`` where torch takes a Python number for a tensor and promotes it as a number.

    torch allows that inside calls of ``torch.ops.aten.add`` and its like, and offers no other way;
    a 0-d tensor in the number's place would change the result's dtype.
    """
    return torch.ops.aten.add.Tensor(_Carrier(call), 0)
