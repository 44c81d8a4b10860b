"""Which groups each value waits for, directly or not: what a group may take in without a cycle."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from .group import Group
from .ir import Value


class Closure:
    """Bitsets of group numbers, one for each value in the program's order, always complete.

    All members of a group wait for the same. Values are met in order; ``met`` is how many were.
    Groups are opened in order, too, but a group that grows may come to wait for one that was opened
    later, and so do those that wait for it: ``low`` is the place of the first who waits for a
    group.
    """

    def __init__(self, values: Sequence[Value], home: Mapping[Value, Group]) -> None:
        self.place = {v: k for k, v in enumerate(values)}
        self.home = home
        self.sets, self.met = [0] * len(values), 0
        self.opened: list[int] = []  # by number of a group, the place of its first member
        self.low: list[int] = []

    def before(self, v: Value) -> int:
        """The groups that v waits for."""
        place = self.place.get(v)
        return 0 if place is None else self.sets[place]

    def until_read(self, v: Value) -> int:
        """The groups that must have run before v can be read."""
        own = self.home.get(v)
        return self.before(v) | (1 << own.number if own is not None else 0)

    def waits(self, two: Group, one: Group) -> bool:
        """Whether group two waits for group one."""
        return bool(self.before(two.members[0]) & 1 << one.number)

    def meet(self, v: Value, sources: Sequence[Value]) -> None:
        """The next value waits for its sources. No group was opened behind it."""
        place = self.place[v]
        self.sets[place] = self._until_read(sources)
        self.met = place + 1

    def put(self, v: Value, sources: Iterable[Value]) -> None:
        """A value that was met before waits for these sources."""
        place = self.place[v]
        waits = self.sets[place] = self._until_read(sources)
        self._note(place, waits)

    def take(
        self, place: int, waits: Sequence[int], opened: Sequence[int], low: Sequence[int]
    ) -> None:
        """The next values, from ``place`` on, wait for this; groups were opened among them."""
        self.sets[place : place + len(waits)] = waits
        self.met = place + len(waits)
        self.opened += opened
        self.low += low

    def _until_read(self, sources: Iterable[Value]) -> int:
        place, home, sets, waits = self.place, self.home, self.sets, 0
        for source in sources:  # as until_read, which would be called for each
            if source in place:
                waits |= sets[place[source]]
            if source in home:
                waits |= 1 << home[source].number
        return waits

    def grow(self, group: Group) -> None:
        """The group waits for what its last member does; so does all that waits for the group."""
        if group.number == len(self.low):
            self.opened.append(group.first)
            self.low.append(group.first)
        sets, place, bit = self.sets, self.place, 1 << group.number
        last = place[group.members[-1]]
        old, new = sets[place[group.members[0]]], sets[last] & ~bit
        if new & ~old:
            first = self.low[group.number]
            for k in range(first, self.met):
                if sets[k] & bit:
                    sets[k] |= new
            for m in group.members:
                sets[place[m]] |= new | old
            self._note(min(first, group.first), new | old)
        # it may wait for other members, which do not wait for themselves
        sets[last] = (sets[last] | old) & ~bit

    def absorb(self, one: Group, two: Group, first: int) -> None:
        """The members of two go to one, of whose places ``first`` will be the first."""
        sets, bit, gone = self.sets, 1 << one.number, 1 << two.number
        waits = (self.before(one.members[0]) | self.before(two.members[0])) & ~(bit | gone)
        start = min(self.low[one.number], self.low[two.number], first)
        for k in range(start, self.met):
            if sets[k] & (bit | gone):
                sets[k] = sets[k] & ~gone | bit | waits
        for m in (*one.members, *two.members):
            sets[self.place[m]] = waits
        self._note(start, waits)
        self.low[one.number] = start

    def _note(self, place: int, waits: int) -> None:
        """From ``place`` on, values wait for these groups: for those opened behind it, news."""
        number = bisect_right(self.opened, place)
        late = waits >> number
        while late:
            lowest = late & -late
            k = number + lowest.bit_length() - 1
            self.low[k] = min(self.low[k], place)
            late ^= lowest
