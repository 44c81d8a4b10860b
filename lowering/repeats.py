"""Composite ops of equal operands are taken apart once.

A ResNet has 53 batch norms, many of one shape, and each is some thirty Values. What the first one
became is kept as a recipe, from which those of the others are made: 2 us a Value, not 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .indexing import is_static
from .ir import SizeArg, Value, base_of
from .one_hot import LOOKED_INTO


class _Place(int):
    """The place of a Value in a recipe, which no literal is taken for."""


class Repeats:
    """The recipes of one graph, by op and operands. They hold no Value of the graph."""

    def __init__(self) -> None:
        self.recipes: dict[Any, _Recipe | None] = {}
        self.latest: tuple[_Recipe, list[Value]] | None = None  # the latest, and of which operands

    def made(
        self, op: Any, args: Sequence[Any], values: list[Value], make: Callable[[], Any]
    ) -> Any:
        """What ``make`` returns, which takes ``op`` of ``args`` apart and appends to ``values``."""
        key = _key(op, args)
        recipe = None if key is None else self.recipes.get(key)
        if recipe is not None:
            result = recipe.follow(args, values)
        else:
            mark = len(values)
            result = make()
            if key is not None and key not in self.recipes:
                recipe = self.recipes[key] = _recipe(args, values[mark:], result)
        self.latest = None if recipe is None else (recipe, _operands(args))
        return result


class _Recipe:
    """``steps``: Values without operands, and those with their places for Values."""

    def __init__(self, steps: Sequence[tuple[Value, Sequence[Any]]], result: Any) -> None:
        self.result = result
        self.steps = [
            (step, operands, tuple([a for a in operands if type(a) is _Place]))
            for step, operands in steps
        ]

    def follow(self, args: Sequence[Any], values: list[Value]) -> Any:
        made = _operands(args)
        for step, operands, places in self.steps:
            inputs = tuple([made[k] for k in places])
            if len(places) == len(operands):
                made.append(step.again(inputs, inputs))
            else:
                own = tuple([made[a] if type(a) is _Place else a for a in operands])
                made.append(step.again(own, inputs))
        values += made[len(made) - len(self.steps) :]
        return _put(self.result, made)


def _recipe(args: Sequence[Any], made: Sequence[Value], result: Any) -> _Recipe | None:
    """How ``made`` followed from ``args``; None where it did not follow from them alone."""
    places = {v: _Place(k) for k, v in enumerate((*_operands(args), *made))}

    def named(what: Any) -> Any:
        if isinstance(what, tuple):
            return tuple(map(named, what))
        return places[what] if isinstance(what, Value) else what

    try:
        steps = [(v.again((), ()), named(v.args)) for v in made]
        return _Recipe(steps, named(result))
    except KeyError:
        return None


def _put(what: Any, made: Sequence[Value]) -> Any:
    """``what``, with the Values made in the places it names."""
    if isinstance(what, tuple):
        return tuple([_put(w, made) for w in what])
    return made[what] if type(what) is _Place else what


def _operands(args: Sequence[Any]) -> list[Value]:
    """The Values among the arguments, each once."""
    found: dict[Value, None] = {}
    for a in args:
        if isinstance(a, Value):
            found[a] = None
        elif isinstance(a, (list, tuple)):
            found.update(dict.fromkeys(_operands(a)))
    return list(found)


def _key(op: Any, args: Sequence[Any]) -> Any:
    """All that a body and the Builder ask of the arguments; None where they may ask for more."""
    places: dict[Value, int] = {}
    described = [_described(a, places) for a in args]
    return None if None in described else (op, *described)


def _described(a: Any, places: dict[Value, int]) -> Any:
    if isinstance(a, Value):
        if a in places:
            return places[a]
        places[a] = len(places)
        if a.op in LOOKED_INTO or a.kind in LOOKED_INTO or not is_static(*a.shape, *a.strides):
            return None
        base = base_of(a)
        stored = base.node is not None
        return (a.shape, a.strides, a.dtype, base.kind, stored)
    if isinstance(a, (list, tuple)):
        inner = tuple([_described(b, places) for b in a])
        return None if None in inner else inner
    if isinstance(a, SizeArg):
        return None
    return (type(a), repr(a) if type(a) is float else a)  # 0.0 and -0.0 are equal
