"""Reaching ATen's own kernel of an overload from below the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def native_kernel(overload: torch._ops.OpOverload, key: str) -> Any:
    """The kernel that the dispatcher would call now; taken before ours is registered.

    ``OpOverload.redispatch`` would come back to ours, for there is no key below the device's.
    """
    return torch.library.get_kernel(overload, key)


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
