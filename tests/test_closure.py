"""Which groups a value waits for, kept complete while groups grow and merge."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gems_compile.lowering.closure import Closure
from gems_compile.lowering.group import Group
from gems_compile.lowering.ir import Value


class Waits:
    """The same from the definition."""

    def __init__(self, sources: dict[Value, list[Value]], home: dict[Value, Group]) -> None:
        self.sources, self.home = sources, home

    def before(self, v: Value) -> set[int]:
        """All members of a group wait for what one does."""
        own, seen, found = self.home.get(v), set(), set()
        stack = [v] if own is None else list(own.members)
        while stack:
            for s in self.sources[stack.pop()]:
                group = self.home.get(s)
                for w in [s] if group is None else group.members:
                    if w not in seen:
                        seen.add(w)
                        stack.append(w)
                if group is not None and group is not own:
                    found.add(group.number)
        return found


@pytest.mark.parametrize("seed", range(60))
def test_closure(seed: int) -> None:
    chance = random.Random(seed)
    values = [Value("pointwise", "relu", (), (4,), "float32") for _ in range(24)]
    sources = {
        v: chance.sample(values[:k], min(k, chance.randrange(3))) for k, v in enumerate(values)
    }
    home: dict[Value, Group] = {}
    groups: list[Group] = []
    closure, waits = Closure(values, home), Waits(sources, home)

    def cycle(one: Group, members: list[Value]) -> bool:
        """Whether something outside waits for the group and is waited for by its new members."""
        return any(
            home.get(s) is not one and s not in members and one.number in waits.before(s)
            for m in members
            for s in sources[m]
        )

    def join(group: Group, v: Value) -> None:
        group.members.append(v)
        home[v] = group
        closure.grow(group)

    def absorb(one: Group, two: Group) -> None:
        first = min(one.first, two.first)
        closure.absorb(one, two, first)
        for m in two.members:
            home[m] = one
        one.members, one.first, two.members = [*one.members, *two.members], first, []

    for k, v in enumerate(values):
        closure.meet(v, sources[v])
        live: list[Any] = [g for g in groups if g.members]
        action = chance.randrange(4)
        group = chance.choice(live) if live and action > 1 else None
        if group is not None and not cycle(group, [v]):
            join(group, v)
        elif action:
            groups.append(Group(len(groups)))
            groups[-1].first = k
            join(groups[-1], v)
        live = [g for g in groups if g.members]
        if len(live) > 1 and chance.random() < 0.3:
            one, two = chance.sample(live, 2)
            if not cycle(one, two.members) and not cycle(two, one.members):
                absorb(one, two)
        for u in values[: k + 1]:
            assert closure.before(u) == sum(1 << n for n in waits.before(u))
