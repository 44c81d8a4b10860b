"""Equal stretches of a sequence, as a model's layers are: found, so that they can be shown once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

#: how long a stretch is looked for
LONGEST = 512


@dataclass(frozen=True)
class Stretch:
    """``length`` items from ``start`` on, which come ``times`` times, one after the other."""

    start: int
    length: int
    times: int = 1


def stretches(keys: Sequence[Hashable]) -> list[Stretch]:
    """The whole sequence, in order: from each place on, the repeat that covers the most of it (the
    shortest of those), and what repeats nothing as stretches that come once.

    ``a b c b c b c d`` -> a once, (b c) three times, d once.
    """
    numbers: dict[Hashable, int] = {}
    items = [numbers.setdefault(key, len(numbers)) for key in keys]
    after = _next_places(items)
    found: list[Stretch] = []
    start = place = 0
    while place < len(items):
        length, times = _longest_repeat(items, after, place)
        if times > 1:
            if start < place:
                found.append(Stretch(start, place - start))
            found.append(Stretch(place, length, times))
        place += length * times
        start = place if times > 1 else start
    if start < len(items):
        found.append(Stretch(start, len(items) - start))
    return found


def _next_places(items: list[int]) -> list[int]:
    """Where each item comes the next time; 0: never."""
    found, seen = [0] * len(items), dict[int, int]()
    for place in range(len(items) - 1, -1, -1):
        found[place] = seen.get(items[place], 0)
        seen[items[place]] = place
    return found


def _longest_repeat(items: list[int], after: list[int], place: int) -> tuple[int, int]:
    """(Length, times) of what repeats from ``place`` on; (1, 1) where nothing does."""
    best = (1, 1)
    other = after[place]
    while other and other - place <= LONGEST:
        length = other - place
        block, end = items[place:other], other
        while items[end : end + length] == block:
            end += length
        times = (end - place) // length
        if times > 1 and length * times > best[0] * best[1]:
            best = (length, times)
        other = after[other]
    return best
