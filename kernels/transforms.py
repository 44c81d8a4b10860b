"""Ops of ours under the transforms of ``torch.func`` and in forward mode.

What ``torch.library.register_autograd`` makes of a gradient is an autograd function that
``torch.func.grad`` refuses, and that loses the tangents of forward mode without a word. There an op
of ours runs as its plain form, in torch's own ops, which torch differentiates and batches to any
depth. Everywhere else its gradient is the registered one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def is_transformed() -> bool:
    """Whether what runs is differentiated by ``torch.func`` or in forward mode."""
    import torch
    from torch.autograd import forward_ad

    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register_gradient(
    library: Any,
    name: str,
    plain: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """As ``torch.library.register_autograd`` for ``gems::name``, which ``plain`` computes as well.
    Without ``backward`` its gradient is always that of ``plain``."""
    import torch
    from torch._library.autograd import Info, make_autograd_impl

    kernel = make_autograd_impl(
        getattr(torch.ops.gems, name).default, Info(backward, setup_context)
    )

    def run(keyset: Any, *args: Any) -> Any:
        wanted = backward is None and torch.is_grad_enabled()
        if is_transformed() or (wanted and any(getattr(a, "requires_grad", False) for a in args)):
            return plain(*args)
        return kernel(keyset, *args)

    library.impl(name, run, "Autograd", with_keyset=True)


def register_batching(library: Any, name: str, plain: Callable[..., Any]) -> None:
    """Under ``torch.vmap``, ``gems::name`` is its plain form, whose ops torch batches."""
    library.impl(name, plain, "FuncTorchBatched")
