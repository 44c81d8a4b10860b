"""Rewrites whose pattern is a function of torch's that was run, as users write them.

Both functions are run on FakeTensors. Of the pattern that tells which calls it makes
(``calls.py``), of the replacement which nodes stand in their place. ``user_rewrites.py`` looks for
them in a graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .calls import PART, Calls, among_fakes, is_unsteady, name_of
from .graph import all_same, is_symbolic, is_tensor
from .rewrite import Constant, Term, Var, is_fake


class NoPattern(Exception):
    """A function that cannot be the pattern or the replacement of a rewrite; the text says why."""


@dataclass(frozen=True)
class Rule:
    """A user's rewrite. ``example``: what the parameters are, FakeTensors and floats. ``declines``:
    takes what the pattern takes, gives a reason or None. ``why_wrong``: the reason not to trust the
    numbers of such a call, or None."""

    name: str
    pattern: Callable[..., Any]
    replacement: Callable[..., Any]
    because: str
    example: tuple[Any, ...]
    declines: Callable[..., str | None] | None
    why_wrong: Callable[[Sequence[Any]], str | None]

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.pattern).parameters)

    @cached_property
    def tree(self) -> Any:
        """The pattern's calls on its example, with parameters where they stand as given."""
        given = {
            name: _unlike(k) if isinstance(value, float) else value
            for k, (name, value) in enumerate(zip(self.parameters, self.example, strict=True))
        }
        found, _ = tree_of(self.pattern, given, Calls())
        tree = _named(found, given)
        missing = set(self.parameters) - {leaf.name for leaf in _leaves(tree, Var)}
        if missing:
            raise NoPattern(
                f"no call of the pattern is given {', '.join(sorted(missing))} as it stands, so "
                "that it cannot be found in a program"
            )
        return tree

    def check(self) -> None:
        """Raise NoPattern where the pattern or the replacement cannot be one."""
        if not isinstance(self.tree, Term):
            raise NoPattern("the pattern calls nothing")
        given = dict(zip(self.parameters, self.example, strict=True))
        _, wanted = tree_of(self.pattern, given, Calls())
        _, made = traced(self.replacement, self.example)
        if (reason := why_other(wanted, made, self.example)) is not None:
            raise NoPattern(reason)


def _unlike(k: int) -> float:
    """A number that stands in no program, so that it is found again in the calls."""
    return 0.7310585786300049 + k * 2.0**-20


def _named(tree: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(tree, Constant):
        found = (n for n, v in given.items() if type(v) is float and tree.value == v)
        name = next(found, None) if type(tree.value) is float else None
        return tree if name is None else Var(name)
    if isinstance(tree, Term):
        return Term(tree.word, tuple(_named(arg, given) for arg in tree.args))
    return tree


def _leaves(tree: Any, kind: type) -> Iterator[Any]:
    if isinstance(tree, kind):
        yield tree
    if isinstance(tree, Term):
        for arg in tree.args:
            yield from _leaves(arg, kind)


# running functions on FakeTensors -----------------------------------------------------------------


def tree_of(
    function: Callable[..., Any], given: Mapping[str, Any], calls: Calls
) -> tuple[Any, Tensor]:
    """What the function calls to make its result of these parameters, and the result."""
    values = tuple(given.values())
    recorder = _Recorder(given, calls)
    with among_fakes([v for v in values if is_tensor(v)]), recorder:
        result = _called("pattern", function, values)
    if not is_tensor(result) or id(result) not in recorder.trees:
        raise NoPattern(f"the pattern returns {_told(result)}; a rewrite is of one tensor")
    return recorder.trees[id(result)], result


def _called(what: str, function: Callable[..., Any], values: Sequence[Any]) -> Any:
    try:
        return function(*values)
    except NoPattern:
        raise
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise NoPattern(f"the {what} fails: {type(error).__name__}: {text}") from error


class _Recorder(TorchFunctionMode):
    """Notes of each tensor which call it comes from."""

    def __init__(self, given: Mapping[str, Any], calls: Calls) -> None:
        super().__init__()
        self.calls, self.kept = calls, list(given.values())
        self.trees: dict[int, Any] = {id(v): Var(name) for name, v in given.items() if is_tensor(v)}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _check_given("pattern", args, kwargs)
        result = function(*args, **kwargs)
        found = tree_leaves(result)
        if not found or not all(map(is_tensor, found)):
            return result
        reading = self.calls.read(function, args, kwargs)
        if reading is None:
            raise NoPattern(
                f"{name_of(function)} cannot be part of a pattern: it writes into its argument "
                "or draws random numbers"
            )
        before = set(map(id, tree_leaves((args, kwargs))))
        if any(id(t) in before for t in found):  # x.contiguous() may be x; its call is not
            result = tree_map(torch.ops.aten.alias, result)
        tree = Term(reading.word, tuple(map(self._tree, reading.args)))
        self._note(result, tree)
        return result

    def _note(self, result: Any, tree: Term) -> None:
        self.kept.append(result)  # while it lives no other tensor has its id
        if is_tensor(result):
            self.trees[id(result)] = tree
        else:
            for k, part in enumerate(result):
                self._note(part, Term(PART, (tree, Constant(k))))

    def _tree(self, argument: Any) -> Any:
        return self.trees[id(argument)] if is_tensor(argument) else Constant(argument)


class _OnlyGiven(TorchFunctionMode):
    """Lets the replacement read its parameters and what it makes of them."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _check_given("replacement", args, kwargs)
        return function(*args, **kwargs)


def _check_given(what: str, args: Any, kwargs: Any) -> None:
    """A tensor of the function's own is no FakeTensor, and in no program."""
    if any(is_tensor(leaf) and not is_fake(leaf) for leaf in tree_leaves((args, kwargs))):
        raise NoPattern(f"the {what} reads a tensor that is none of its parameters")


def traced(function: Callable[..., Any], values: Sequence[Any]) -> tuple[fx.Graph, Any]:
    """The function's calls on the tensors and sizes among ``values``, and its result."""
    places = [i for i, v in enumerate(values) if is_tensor(v) or is_symbolic(v)]
    results: list[Any] = []

    def run(*given: Any) -> Any:
        filled = dict(zip(places, given, strict=True))
        arguments = [filled.get(i, v) for i, v in enumerate(values)]
        with _OnlyGiven():
            results.append(_called("replacement", function, arguments))
        return results[-1]

    given = [values[i] for i in places]
    with among_fakes([v for v in values if is_tensor(v)]):
        graph = _called("replacement", make_fx(run, pre_dispatch=True), given).graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        # of what tracing notes its value alone: its line is where it will stand
        node.meta = {"example_value": node.meta["val"]} if "val" in node.meta else {}
        if is_unsteady(node):
            raise NoPattern(f"the replacement calls {node.target}, which writes or is random")
    if not is_tensor(results[-1]):
        raise NoPattern(f"the replacement returns {_told(results[-1])}; a rewrite is of one tensor")
    return graph, results[-1]


def why_other(wanted: Tensor, made: Tensor, values: Sequence[Any]) -> str | None:
    """Why a tensor may not stand for another: what a program can see of both."""
    if not (
        (wanted.dtype, wanted.device) == (made.dtype, made.device)
        and all_same(wanted.shape, made.shape)
        and all_same(wanted.stride(), made.stride())
    ):
        return f"the replacement gives {_told(made)}, the pattern {_told(wanted)}"
    if _shares(wanted, values) or _shares(made, values):
        return "a result lies in the memory of a parameter, where who writes into one changes both"
    return None


def _shares(result: Tensor, values: Sequence[Any]) -> bool:
    memory = result.untyped_storage()._cdata
    return any(is_tensor(v) and v.untyped_storage()._cdata == memory for v in values)


def _told(value: Any) -> str:
    if not is_tensor(value):
        return f"a {type(value).__name__}"
    shape, strides = (", ".join(map(str, n)) for n in (value.shape, value.stride()))
    return f"{str(value.dtype)[6:]} [{shape}] with strides [{strides}] on {value.device.type}"
