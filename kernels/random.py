"""Random numbers on the device: a function of (seed, salt, place), so that none is ever stored."""

import triton
import triton.language as tl


@triton.jit
def uniform(seed, salt, place):
    """Uniform float32 in [0, 1): Philox 4x32-10 keyed by the run's seed and the op's salt."""
    return tl.rand(seed + salt, place.to(tl.int32))
