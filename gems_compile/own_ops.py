"""Ops of ours in eager mode: each call runs kernels that were compiled for its description.

As ``one_op`` does it for ATen's ops, but for two things: an op of ours has no kernel of ATen's to
fall back to, so its plain form runs there; and it is many of ATen's in one, worth a copy of an
operand that no kernel reads as it lies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .calls.one_op import Handler
from .config import vendor
from .kernels import load_ops
from .kernels.served import serve_with
from .kernels.target import Target, current_target

_handlers: dict[str, Handler] = {}
_lock = threading.Lock()


class OwnOp(Handler):
    """Serves ``gems::name`` on the target's device; ``plain`` is its form in ATen's ops."""

    def __init__(self, name: str, plain: Callable[..., Any], target: Target) -> None:
        super().__init__(getattr(torch.ops.gems, name).default, target)
        self._plain = plain

    def _aten(self, keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self._plain(*args)

    def _why_native(self, tensors: Sequence[Tensor], options: dict[str, Any]) -> str | None:
        devices = {t.device for t in tensors}
        if len(devices) != 1:
            return f"operands on {', '.join(sorted(map(str, devices)))}"
        return "its first operand is empty" if tensors[0].numel() == 0 else None


def serve(name: str, plain: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A call of ``gems::name``; see ``kernels.served``."""
    target = current_target(vendor())
    first = next(a for a in args if isinstance(a, Tensor))
    if target is None or first.device.type != target.device:
        return plain(*args)
    handler = _handlers.get(name)
    if handler is None:
        with _lock:
            handler = _handlers.setdefault(name, OwnOp(name, plain, target))
    return handler(None, *args)


def stats() -> dict[str, dict[str, int]]:
    """Per op that was called: ``ours`` and ``native`` calls, ``compiled`` variants."""
    return {name: handler.counts() for name, handler in list(_handlers.items())}


load_ops()
serve_with(serve)
