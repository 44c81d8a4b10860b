"""Composite ops of equal structure are fused once.

A ResNet has 53 batch norms, each some thirty Values between two convolutions. What the fuser does
with the Values of one follows from their own structure, as long as no kernel knows their operands
yet and what reads them is alike: then the kernels that the first one came to are made again, which
takes a third of the time of asking whether each Value may join each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .group import Group
from .ir import Value
from .sweep import set_shares
from .views import Frame

if TYPE_CHECKING:
    from .fuse import Fuser

#: fewer Values are placed as fast as it is found out whether they need be
FEWEST = 8

Ref = int  # a Value's place in its stretch; operands are counted down from -1


class Stretch:
    """Values that follow each other in the program: those of one composite, or any others."""

    def __init__(
        self,
        replays: Replays,
        values: Sequence[Value],
        operands: Sequence[Value] = (),
        recipe: Any = None,
        told: int = 0,
    ) -> None:
        """``recipe``: what the first so many values (``told``) followed from."""
        self.replays, self.values = replays, values
        self.operands, self.recipe, self.told = operands, recipe, told
        self.key: Any = None
        self.start = (0, 0)  # how many groups there were, and how many pairs that were not fused

    def follow(self) -> bool:
        """Make the groups that an equal stretch came to; False where these have to be found."""
        if self.recipe is None:
            return False
        self.key = self.replays.key_of(self)
        known = None if self.key is None else self.replays.known.get(self.key)
        self.start = len(self.replays.fuser.groups), len(self.replays.fuser.unfused)
        if known is None:
            return False
        known.make(self)
        return True

    def keep(self) -> None:
        """The groups were found: equal stretches will come to the same."""
        if self.key is not None:
            self.replays.known[self.key] = Groups(self)


class Replays:
    """The stretches of one program, and what those that may occur again came to."""

    def __init__(self, fuser: Fuser) -> None:
        self.fuser = fuser
        self.known: dict[Any, Groups] = {}

    def stretches(self) -> Iterator[Stretch]:
        """All values of the program, in order."""
        values, place = self.fuser.program.values, self.fuser.place
        recipes = self.fuser.program.recipes
        many = Counter(recipe for recipe, _ in recipes.values())
        done = 0
        for node, (recipe, operands) in recipes.items():
            if many[recipe] < 2:
                continue
            made = self.fuser.program.made[node]
            own = [v for v in made if v in place]
            if len(own) < FEWEST or place[own[-1]] - place[own[0]] != len(own) - 1:
                continue
            first, kept = place[own[0]], tuple([v in place for v in made])
            yield Stretch(self, values[done:first])
            told = sum(kept[: len(recipe.steps)])
            yield Stretch(self, own, operands, (recipe, kept), told)
            done = first + len(own)
        yield Stretch(self, values[done:])

    def key_of(self, stretch: Stretch) -> Any:
        """All that the fuser asks of the stretch beside what its recipe says; None where it may ask
        for more than that."""
        fuser, place = self.fuser, self.fuser.place
        start = place[stretch.values[0]]
        if not all(self._is_fresh(a, start) for a in stretch.operands):
            return None
        inlined, escapes, feeds = fuser.inlined, fuser.escapes, fuser.column_feeds
        described: list[Any] = [tuple([a in inlined for a in stretch.operands])]
        given = {a: -1 - k for k, a in enumerate(stretch.operands)}
        end = start + len(stretch.values)
        for k, v in enumerate(stretch.values):
            if v.kind == "store" or v in fuser.waits:
                return None
            if k >= stretch.told:  # what it is made of, the recipe does not say
                bases = [
                    place[b] - start if place.get(b, -1) >= start else given.get(b) for b in v.bases
                ]
                if None in bases:
                    return None
                described.append((v.op, v.kind, v.shape, *bases))
            elif any(place.get(b, -1) < start and b not in given for b in v.bases):
                return None  # it stands for one of the stretch's that is not among its values
            own = [v.strides, v.node is None, v in inlined, v in escapes, v in feeds]
            for reader, _ in fuser.readers.get(v, ()):
                inside = place[reader] < end
                if not inside and (reader.reduces or reader in feeds):
                    return None
                own.append(place[reader] - start if inside else -1)
            described.append(tuple(own))
        return (stretch.recipe, *described)

    def _is_fresh(self, a: Value, start: int) -> bool:
        """Whether an operand leads to no kernel that a value might join."""
        fuser = self.fuser
        if a.kind != "buffer" and not (a.kind == "pointwise" and a in fuser.inlined):
            return False
        return not any(fuser.is_near(group, start) for group in fuser.near.get(a, ()))


@dataclass
class _Closed:
    """What a value waits for: groups of its stretch, and whatever some of its operands wait for."""

    own: int
    operands: tuple[int, ...]


class Groups:
    """What the fuser came to for a stretch, told without its Values: groups by their order, Values
    by their place."""

    def __init__(self, stretch: Stretch) -> None:
        fuser, (first, unfused) = stretch.replays.fuser, stretch.start
        refs: dict[Value, Ref] = {a: -1 - k for k, a in enumerate(stretch.operands)}
        refs.update((v, k) for k, v in enumerate(stretch.values))
        start = fuser.place[stretch.values[0]]
        order = {group: k for k, group in enumerate(fuser.groups[first:])}
        self.groups = [_Snapshot(group, refs, start) for group in order]
        self.near = [
            (ref, [order[g] for g in fuser.near[v] if g in order])
            for v, ref in refs.items()
            if v in fuser.near
        ]
        self.twins = [
            (producer - first, rest, order[group])
            for (producer, *rest), group in fuser.twins.items()
            if group in order
        ]
        self.twin_frames = [
            (producer - first, rest, order[group], frame)
            for (group, (producer, *rest)), frame in fuser.twin_frames.items()
            if group in order
        ]
        self.unfused = [(refs[base], refs[v], why) for base, v, why in fuser.unfused[unfused:]]
        self.low = [low - start for low in fuser.closure.low[first:]]
        self.closed = self._closed(stretch, refs, order)

    @staticmethod
    def _closed(stretch: Stretch, refs: dict[Value, Ref], order: dict[Group, int]) -> list[_Closed]:
        fuser, first = stretch.replays.fuser, stretch.start[0]
        direct: dict[Any, set[int]] = {group: set() for group in order}  # of Values, and of groups
        for v in stretch.values:
            found = direct[v] = set()
            for source in v.bases:
                if refs[source] < 0:
                    found.add(-1 - refs[source])
                elif source not in fuser.home:
                    found |= direct[source]
            if v in fuser.home:
                direct[fuser.home[v]] |= found
        closed = []
        for v in stretch.values:
            waits = fuser.closure.before(v) >> first
            behind = [] if v.kind == "view" else [direct[fuser.home.get(v, v)]]
            behind += [direct[group] for group, k in order.items() if waits >> k & 1]
            closed.append(_Closed(waits, tuple(sorted(set().union(*behind)))))
        return closed

    def make(self, stretch: Stretch) -> None:
        """The same for the Values of another stretch."""
        fuser, values, operands = stretch.replays.fuser, stretch.values, stretch.operands
        first, start = len(fuser.groups), fuser.place[values[0]]

        def at(ref: Ref) -> Value:
            return values[ref] if ref >= 0 else operands[-1 - ref]

        made = [known.make(first + k, at, start) for k, known in enumerate(self.groups)]
        fuser.groups += made
        for group in made:
            fuser.home.update(dict.fromkeys(group.members, group))
            for m in group.members:
                if m.kind == "partial":
                    set_shares(m, group.shares)
        for ref, numbers in self.near:
            fuser.near[at(ref)] += [made[k] for k in numbers]
        for producer, rest, k in self.twins:
            fuser.twins[(first + producer, *rest)] = made[k]
        for producer, rest, k, frame in self.twin_frames:
            fuser.twin_frames[made[k], (first + producer, *rest)] = frame
        fuser.unfused += [(at(base), at(v), why) for base, v, why in self.unfused]
        before = [fuser.closure.before(a) for a in operands]
        waits = []
        for known in self.closed:
            bits = known.own << first
            for k in known.operands:
                bits |= before[k]
            waits.append(bits)
        fuser.closure.take(start, waits, [g.first for g in made], [start + k for k in self.low])


class _Snapshot:
    """A group as it was at the end of its stretch."""

    def __init__(self, group: Group, refs: dict[Value, Ref], start: int) -> None:
        self.members = [refs[m] for m in group.members]
        self.tied = sorted(refs[m] for m in group.tied)
        self.frames: list[tuple[Ref, Frame]] = (
            [(refs[v], frame) for v, frame in group.frames.items()] if group.members else []
        )
        self.first, self.last = group.first - start, group.last - start
        self.facts = group.facts()

    def make(self, number: int, at: Any, start: int) -> Group:
        group = Group(number)
        group.take_facts(self.facts)
        group.members = [at(ref) for ref in self.members]
        group.tied = {at(ref) for ref in self.tied}
        group.frames = {at(ref): frame for ref, frame in self.frames}
        group.first, group.last = start + self.first, start + self.last
        return group
