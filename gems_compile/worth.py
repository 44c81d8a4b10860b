"""Where the kernel of one op alone measured faster than ATen's: what eager mode replaces unasked.

On a GPU a call through Python costs 10 to 20 microseconds of the host's time more than ATen's own,
so ours must save that on the device. One pointwise kernel moves the bytes that ATen's moves and
saves nothing; softmax and the norms read a long row once where ATen reads it twice or more.

Measured on an H200 with torch 2.11 in bfloat16, steady calls, host time included (ATen / ours):

    softmax             8192 x 1024: 0.7   8192 x 4096: 2.4   4096 x 32768: 0.9   dim 0: 3 to 50
    softmax backward    8192 x 1024: 1.3   8192 x 4096: 2.0   4096 x 32768: 1.3
    log_softmax         8192 x 1024: 0.6   8192 x 4096: 2.5   4096 x 32768: 0.8
    layer_norm          8192 x 1024: 0.6   8192 x 4096: 1.5   4096 x 32768: 1.1
                        of ViT-B/16, 64 images (12608 x 768), within the model: 1.07 of a whole step
    rms_norm            8192 x 1024: 0.4   8192 x 4096: 1.2   4096 x 32768: 1.1
    rms_norm backward   8192 x 1024: 0.5   8192 x 4096: 1.0   4096 x 32768: 1.1
    group_norm          8 x 256 x 32 x 32: 0.7   64 x 320 x 64 x 64: 2.2   (backward 1.1)
    logsumexp           1 x 4096: 2.2   8192 x 1024: 2.9   8192 x 4096: 5.4   4096 x 32768: 3.7
    var_mean            8192 x 1024: 0.4   8192 x 4096: 1.7
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

#: ATen name -> the least number of elements of its largest operand
LEAST = {
    "_softmax": 2**24,
    "_softmax_backward_data": 2**23,
    "_log_softmax": 2**24,
    "native_layer_norm": 2**23,
    "_fused_rms_norm": 2**24,
    "_fused_rms_norm_backward": 2**24,
    "native_group_norm": 2**24,
    "native_group_norm_backward": 2**24,
    "logsumexp": 0,
    "var_mean": 2**24,
}
#: Longer rows do not stay on the chip; ATen's softmax loops over them faster than ours.
LONGEST = {"_softmax": 16384, "_log_softmax": 16384}
#: ATen's softmax over another dim than the last reads memory across rows.
LEAST_ACROSS = 2**19


def least_elements(name: str) -> int:
    """The fewest elements of its first operand with which any call of an overload may be ours."""
    base = name.split(".")[0]
    least = LEAST.get(base, sys.maxsize)
    return min(least, LEAST_ACROSS) if base in LONGEST else least


def why_not_worth(name: str, args: Sequence[Any]) -> str | None:
    """Why a call of an overload that nobody asked for by name stays ATen's, or None."""
    base = name.split(".")[0]
    if base not in LEAST:
        return "one kernel of ours gains nothing over ATen's"
    largest = max((a.numel() for a in args if isinstance(a, Tensor)), default=0)
    least = LEAST[base]
    if base in LONGEST:
        x, dim = args[0], args[1]
        if dim % max(x.ndim, 1) != x.ndim - 1:
            least = LEAST_ACROSS
        elif x.shape[dim] > LONGEST[base]:
            return f"a row has more than {LONGEST[base]} elements: ATen is faster"
    if largest < least:
        return f"less than {least} elements: the call costs more than the kernel saves"
    return None
