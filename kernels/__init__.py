"""What each op is: declarations, device functions, targets. Runs no compiler, imports no torch."""

from __future__ import annotations

import importlib

#: the files that declare ops
OP_FILES = (
    "arithmetic",
    "comparison",
    "unary",
    "activation",
    "cast",
    "reduction",
    "scan",
    "softmax",
    "norm",
    "loss",
    "indexing",
    "scatter",
    "dropout",
    "draws",
    "pool",
    "product",
)


def load_ops() -> None:
    """Import every op file, so that ``op.OPS`` is full."""
    for name in OP_FILES:
        importlib.import_module(f".{name}", __name__)
