"""Dropout whose mask is a function of a seed: the backward draws it again instead of loading it.

AOTAutograd sees ``native_dropout`` as ``gems::seed``, ``gems::dropout_mask`` and a product. The
implementations registered here are plain ATen and draw the very numbers that the kernels draw.
Compile workers import this file without torch: torch is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

from .op import T, call, composite

_WORD = 0xFFFFFFFF

#: of Philox 4x32 for a mask: the fewest that Salmon et al. (2011) found to pass BigCrush, and what
#: FlashAttention draws its masks with; generators of numbers take ten for safety
ROUNDS = 7

#: no seed is this number: it tells a kernel that the seed is in memory
IN_MEMORY = 2**63 - 1


def define(library: Any) -> None:
    """Register ``gems::seed`` and ``gems::dropout_mask`` on a torch Library.

    seed:          one int64 drawn from the device's default generator
    dropout_mask:  True where an element is kept: with probability 1 - p, by Philox 4x32-7 keyed
                   by the seed and ``salt``, at the element's place in a contiguous tensor
    """
    import torch

    plain = torch.Tag.pt2_compliant_tag
    library.define("seed(Device device) -> Tensor", tags=(plain, torch.Tag.nondeterministic_seeded))
    library.define(
        "dropout_mask(Tensor seed, SymInt[] size, float p, int salt) -> Tensor", tags=(plain,)
    )
    library.impl("seed", draw_seed, "CompositeExplicitAutograd")
    library.impl("dropout_mask", _mask, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "gems::seed", lambda device: torch.empty((), dtype=torch.int64, device=device), lib=library
    )
    torch.library.register_fake(
        "gems::dropout_mask",
        lambda seed, size, p, salt: seed.new_empty(size, dtype=torch.bool),
        lib=library,
    )


class _Source(threading.local):
    generator: Any = None


#: the generator that this thread draws seeds from now, if not the device's default one
source = _Source()


@contextlib.contextmanager
def drawing_from(generator: Any) -> Iterator[None]:
    """Seeds of this thread come from a generator of the program's own."""
    before, source.generator = source.generator, generator
    try:
        yield
    finally:
        source.generator = before


def draw_seed(device: Any) -> Any:
    """One 64-bit seed from the device's default generator, or from ``source``'s.

    What ``torch.randint`` draws; not through that, which eager mode may serve with a seed.
    """
    import torch

    memory = torch.empty((), dtype=torch.int64, device=device)
    return memory.random_(-(2**63), IN_MEMORY, generator=source.generator)


#: by how much ``draw_seed`` moves a CUDA generator's offset
DRAWN_AT_ONCE = 4


def number_drawn(seed: int, offset: int) -> int:
    """What ``draw_seed`` draws from a CUDA generator of this seed and offset.

    cuRAND's generator is Philox 4x32-10; a counter's words are four steps of the offset.
    """
    high, low, _, _ = _philox(seed, offset // DRAWN_AT_ONCE, rounds=10)
    return (high << 32 | low) % (2**64 - 1) - 2**63


def _mask(seed: Any, size: Any, p: float, salt: int) -> Any:
    return drawn_words(seed + salt, size) >= threshold(p)


def drawn_words(key: Any, size: Any) -> Any:
    """The word of each place of a contiguous tensor, as int64."""
    import torch

    count = math.prod(size)
    counter = torch.arange(-(-count // 4), device=key.device)
    return torch.stack(_philox(key, counter), -1).reshape(-1)[:count].reshape(size)


def threshold(p: float) -> int:
    """A 32-bit word is below it with probability p."""
    return min(round(p * 2**32), _WORD)


def _philox(key: Any, counter: Any, rounds: int = ROUNDS) -> tuple[Any, ...]:
    """``kernels.random`` in int64 arithmetic, or Python's: four words of each counter."""
    c0, c1, c2, c3 = counter & _WORD, counter >> 32, counter & 0, counter & 0
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (b >> 32 & _WORD) ^ c1 ^ k0, (a >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def native_dropout(x: Any, p: float, train: Any) -> Any:
    """The decomposition of ``aten.native_dropout``: (x * mask / (1 - p) rounded once, mask)."""
    import torch

    if train is False or not 0.0 < p < 1.0 or not x.is_floating_point():
        return NotImplemented
    gems = torch.ops.gems
    seed = gems.seed.default(x.device)
    mask = gems.dropout_mask.default(seed, x.shape, p, 0)
    scaled = torch.ops.aten.native_dropout_backward.default(x, mask, 1.0 / (1.0 - p))
    return scaled, mask


@composite(
    "gems.dropout_mask.default",
    samples=[call(T(dtype="int64", low=0, high=2**40), [7, 33], 0.3, 5)],
)
def dropout_mask(b: Any, seed: Any, size: Any, p: float, salt: int) -> Any:
    """Whether each element is kept: probability 1 - p."""
    shape = tuple(getattr(s, "expr", s) for s in size)
    return b.kept(shape, seed, salt, threshold(p))
