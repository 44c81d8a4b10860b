"""Random numbers on the device: a function of (seed, salt, place), so that none is ever stored.

Philox 4x32-10 (Salmon et al. 2011) makes four words of a counter. Place i has word i % 4 of counter
i // 4, whatever the tile it is computed in: forward and backward differ in theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, salt, place, threshold, fours):
    """Whether the word of each place is at least the threshold.

    ``fours``: the axis along which places come in runs of four from a multiple of four, so that a
    counter's words all are of use; None where there is no such axis.
    """
    if fours is None:
        words = _word_of_each(seed + salt, place)
    elif len(place.shape) == 2 and fours == 0:
        words = tl.trans(_words_of_fours(seed + salt, tl.trans(place)))
    else:
        words = _words_of_fours(seed + salt, place)
    return words >= tl.full([], threshold, tl.uint32)


@triton.jit
def _word_of_each(key, place):
    w0, w1, w2, w3 = _philox(key, place)
    odd, upper = (place & 1) != 0, (place & 2) != 0
    return tl.where(upper, tl.where(odd, w3, w2), tl.where(odd, w1, w0))


@triton.jit
def _words_of_fours(key, place):
    """Along the last axis. The tile is cut and joined such that an element stays in its thread."""
    pairs, _ = tl.split(tl.reshape(place, _in_fours(place.shape)))
    first, _ = tl.split(pairs)
    w0, w1, w2, w3 = _philox(key, first)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.constexpr_function
def _in_fours(shape):
    return [*shape[:-1], shape[-1] // 4, 2, 2]


@triton.jit
def _philox(key, place):
    """The four words of each place's counter."""
    c0 = (place >> 2).to(tl.uint32)
    c1 = c0 * 0
    if place.dtype == tl.int64:
        c1 = (place >> 34).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        b0, b2 = c0, c2
        c0 = tl.umulhi(b2, 0xCD9E8D57) ^ c1 ^ k0
        c2 = tl.umulhi(b0, 0xD2511F53) ^ c3 ^ k1
        c1 = b2 * 0xCD9E8D57
        c3 = b0 * 0xD2511F53
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3
