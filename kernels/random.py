"""Random numbers on the device: a function of (seed, salt, place), so that none is ever stored.

Philox 4x32-7 (Salmon et al. 2011; see ``ROUNDS``) makes four words of a counter. Place i has word
i % 4 of counter i // 4, whatever the tile it is computed in: forward and backward differ in theirs.
"""

# ruff: noqa: RET505 - Triton compiles what follows a static if, a return in it or not
from __future__ import annotations

import triton
import triton.language as tl

from .dropout import IN_MEMORY, ROUNDS

_IN_MEMORY, _ROUNDS = tl.constexpr(IN_MEMORY), tl.constexpr(ROUNDS)


@triton.jit
def drawn(memory, number, first):
    """The seed of the run: ``number``, which the first program leaves in memory for those who read
    it later; or what is in memory already."""
    number = number.to(tl.int64)
    seed = tl.load(memory, mask=number == _IN_MEMORY, other=number)
    tl.store(memory, number, mask=(number != _IN_MEMORY) & first)
    return seed


@triton.jit
def kept(seed, salt, place, threshold, fours, nvidia):
    """Whether the word of each place is at least the threshold: see ``_words``."""
    words = _words(seed, salt, place, fours, nvidia)
    return words >= tl.full([], threshold, tl.uint32)


@triton.jit
def bits(seed, salt, place, count: tl.constexpr, fours, nvidia):
    """The upper ``count`` bits, fewer than 32, of the word of each place: see ``_words``."""
    return (_words(seed, salt, place, fours, nvidia) >> (32 - count)).to(tl.int32)


@triton.jit
def _words(seed, salt, place, fours, nvidia):
    """The word of each place.

    ``fours``: the axis along which places come in runs of four from a multiple of four, so that a
    counter's words all are of use; None where there is no such axis. ``nvidia``: the kernel is one
    for NVIDIA's GPUs.
    """
    if fours is None:
        return _word_of_each(seed + salt, place, nvidia)
    elif len(place.shape) == 2 and fours == 0:
        return tl.trans(_words_of_fours(seed + salt, tl.trans(place), nvidia))
    else:
        return _words_of_fours(seed + salt, place, nvidia)


@triton.jit
def _word_of_each(key, place, nvidia):
    w0, w1, w2, w3 = _philox(key, place, nvidia)
    odd, upper = (place & 1) != 0, (place & 2) != 0
    return tl.where(upper, tl.where(odd, w3, w2), tl.where(odd, w1, w0))


@triton.jit
def _words_of_fours(key, place, nvidia):
    """Along the last axis. The tile is cut and joined such that an element stays in its thread."""
    pairs, _ = tl.split(tl.reshape(place, _in_fours(place.shape)))
    first, _ = tl.split(pairs)
    w0, w1, w2, w3 = _philox(key, first, nvidia)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.constexpr_function
def _in_fours(shape):
    return [*shape[:-1], shape[-1] // 4, 2, 2]


@triton.jit
def _philox(key, place, nvidia):
    """The four words of each place's counter."""
    c0 = (place >> 2).to(tl.uint32)
    c1 = c0 * 0
    if place.dtype == tl.int64:
        c1 = (place >> 34).to(tl.uint32)
    c2, c3 = c0 * 0, c0 * 0
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        low0, high0 = _times(c0, 0xD2511F53, nvidia)
        low2, high2 = _times(c2, 0xCD9E8D57, nvidia)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _times(x, factor: tl.constexpr, nvidia):
    """The lower and the upper word of a product.

    NVIDIA's compiler makes one instruction of ``mul.wide`` alone, not of two halves (dropout of
    2 ** 26 in bfloat16, H200: 68.5 us, 74.8 with halves); a 64-bit product in Triton is wide too,
    but is then computed in another layout and exchanged through shared memory.
    """
    if nvidia:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 wide; mul.wide.u32 wide, $2, $3; mov.b64 {$0, $1}, wide; }",
            "=r,=r,r,n",
            [x, factor],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        return x * factor, tl.umulhi(x, factor)
