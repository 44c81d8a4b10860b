"""What was rewritten and what nearly was, as plain data, with the nodes as lines to read."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..lowering.graph import value_of
from ..lowering.rewrite import RewriteLog
from .typed import describe

log = logging.getLogger(__name__)

#: what equal layers' rewrites have in common
SAME = ("rule", "because", "nodes_before", "alike")


@dataclass(frozen=True)
class Rewritten:
    rule: str
    because: str
    nodes_before: int
    nodes_after: int
    line: str
    module: str
    before: tuple[str, ...] = field(default=(), compare=False)  # a line a node, if asked for
    after: tuple[str, ...] = field(default=(), compare=False)
    alike: str = ""  # a key that equal layers share, whose nodes have other names


@dataclass(frozen=True)
class NearMiss:
    rule: str
    node: str
    reason: str
    line: str
    module: str


def fired(log: RewriteLog) -> tuple[Rewritten, ...]:
    return tuple(
        Rewritten(
            f.rule,
            f.because,
            f.nodes_before,
            f.nodes_after,
            f.source,
            f.module,
            plain(f.before),
            plain(f.after),
            alike(f.before, f.after),
        )
        for f in log.fired
    )


def missed(log: RewriteLog) -> tuple[NearMiss, ...]:
    return tuple(NearMiss(m.rule, m.node, m.reason, m.source, m.module) for m in log.near_misses)


# nodes as lines ----------------------------------------------------------------------------------

_MARKED = re.compile(r"%(?=[A-Za-z_])\w+")
_NUMBERED = re.compile(r"(?<=\w)_\d+\b")
#: where torch keeps functions, and what programs call them
_SHORT = {"torch.nn.functional.": "F.", "torch._C._nn.": "F.", "_operator.": "operator."}


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return f"%{self}"


def written_out(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """``%softmax = aten._softmax.default(%mul, -1, False)  # f32[2, 4, 8]`` of each node, in the
    graph's order. The % of names is fx's; by it ``alike`` and ``plain`` know them. What cannot be
    written stops no compile."""
    try:
        return tuple(map(_line, sorted(nodes)))
    except Exception as error:
        log.warning("a rewrite's nodes are not told: %s: %s", type(error).__name__, error)
        return ()


def _line(node: fx.Node) -> str:
    value = value_of(node)
    kind = "" if value is None else f"  # {describe(value)}"
    return f"%{node.name} = {_called(node)}{kind}"


def _called(node: fx.Node) -> str:
    """``%x.softmax(-1)``, ``torch.matmul(%a, %b)``; of an input or an attribute, its name."""
    if not node.op.startswith("call_"):
        return str(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Name(n.name))
    given = [repr(arg) for arg in args]
    target: Any = node.target
    if node.op == "call_method":
        target = f"{given.pop(0)}.{target}"
    elif callable(target):
        target = _function(target)
    given += [f"{name}={arg!r}" for name, arg in kwargs.items()]
    return f"{target}({', '.join(given)})"


def _function(target: Any) -> str:
    """``F.silu``, ``operator.mul``, ``aten.mm.default``."""
    if hasattr(target, "_schema"):
        return str(target)
    module = f"{getattr(target, '__module__', None) or 'torch'}."
    return _SHORT.get(module, module) + str(getattr(target, "__name__", target))


def plain(lines: Iterable[str]) -> tuple[str, ...]:
    """Lines of ``written_out`` without the marks of names."""
    return tuple(_MARKED.sub(lambda m: m[0][1:], line) for line in lines)


def alike(before: Iterable[str], after: Iterable[str]) -> str:
    """A key of lines of ``written_out`` that is the same for equal layers, whose nodes have other
    names; empty where nothing was written."""
    numbers: dict[str, str] = {}

    def number(name: re.Match[str]) -> str:
        return numbers.setdefault(name[0], f"%{len(numbers)}")

    text = "\n".join(_MARKED.sub(number, line) for line in (*before, "->", *after))
    return hashlib.sha256(text.encode()).hexdigest()[:8] if text != "->" else ""


def without_numbers(reason: str) -> str:
    """A reason of which equal layers have the same: their nodes' names differ in a number."""
    return _NUMBERED.sub("", reason)
