"""The few values a compile depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """``exact``: round where eager rounds. ``alone``: also fuse an op that has no neighbour.

    ``target`` is a ``kernels.target.Target``; ``cache_dir`` where kernels are kept, or None.
    """

    target: Any
    exact: bool = True
    strict: bool = False
    alone: bool = False
    own_rng: bool = True
    keep_weights: bool = False  # of inference, in the layout that they are converted to
    layout: str = "auto"  # of convolutions, see ``channels_last``
    cudagraphs: bool = False  # whether what can be is captured
    cache_dir: str | None = None
    cache_bytes: int = 2**30  # that kernels may take there
    threads: int | None = None
    tune: bool = False  # whether tiles are measured
    tune_seconds: float = 10.0  # that a graph's kernels may take for it
