"""Gradients in a graph's own memory, given away without a copy where the program is done with them
before the next forward.

A training loop sets its gradients to None, or frees what held them, before it calls the model
again; one that adds them up over several backwards keeps them. Copies tell which one it is: when
three in a row were gone by the next forward, later ones are lent. If lent ones are then still held
by a forward, that forward leaves the graphs' memory alone, and gradients are copied from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .copies import alias

#: backwards in a row whose gradients were gone in time
PATIENCE = 3


class Lender:
    """What a backward's results go through, in place of what copies them. ``watched``: whether the
    next forward shall ``look`` at what became of the last ones."""

    def __init__(self) -> None:
        self.gone = 0  # times in a row; negative: they are copied for good
        self.copies: list[StorageWeakRef] = []
        self.lent = False  # what was given away last, and may still be held

    @property
    def lends(self) -> bool:
        return self.gone >= PATIENCE

    @property
    def watched(self) -> bool:
        return self.lent or bool(self.copies)

    def __call__(self, copy: Callable[..., list[Any]], *results: Any) -> Any:
        if self.lends:
            self.lent = True
            return tuple(map(alias, results))  # whose references the trees see
        copies = copy(*results)
        if self.gone >= 0:
            tensors = [c for c in copies if isinstance(c, torch.Tensor)]
            self.copies = [StorageWeakRef(c.untyped_storage()) for c in tensors]
        return copies

    def look(self, trees: Any) -> None:
        """A forward is about to run."""
        copied = any(not copy.expired() for copy in self.copies)
        held = trees.holds() if self.lent else copied
        self.copies = []
        if held:
            self.gone = -1
            return
        self.lent = False
        if self.gone >= 0:
            self.gone += 1
