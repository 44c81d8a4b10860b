"""Random numbers: a function of (seed, op, place), so that nothing random is ever stored."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .op import T, call, composite  # noqa: F401


@triton.jit
def uniform(seed, salt, place):
    """Uniform float32 in [0, 1): Philox keyed by the run's seed and the op's salt."""
    return tl.rand(seed + salt, place.to(tl.int32))


def dropout_mask(b: Any, shape: Any, p: float, salt: int) -> Any:
    """Whether an element is kept: probability 1 - p."""
    return b.call("ge", b.random(shape, salt), p, dtype="bool")


def _training(x: Any, p: float, train: Any) -> str | None:
    return None if 0.0 < p < 1.0 and train is not False else "nothing random about it"


@composite("aten.native_dropout.default", declines=_training)
def native_dropout(b: Any, x: Any, p: float, train: Any) -> Any:
    """x / (1 - p) where kept, else 0; (y, kept)."""
    kept = dropout_mask(b, x.shape, p, b.next_salt())
    hold = b.call("mul", b.cast(x, "float32") if x.dtype != "float64" else x,
                  b.cast(kept, "float32" if x.dtype != "float64" else "float64"))
    return b.cast(b.mul(hold, 1.0 / (1.0 - p)), x.dtype), kept
