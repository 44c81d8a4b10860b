"""The users' rewrites that hold now; ``rewriting.py`` makes them, each compile asks here."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lowering.rewrite import RewriteLog
    from .lowering.traced import Rule
    from .rewriting import Rewriting

_rules: dict[str, Rewriting] = {}
_lock = threading.Lock()


def add(rule: Rewriting) -> None:
    """In place of one of the same name, such as a notebook's cell made before."""
    with _lock:
        _rules[rule.name] = rule


def remove(rule: Rewriting) -> None:
    with _lock:
        if _rules.get(rule.name) is rule:
            del _rules[rule.name]


def active(memory: bool) -> list[Rule]:
    """What a compile applies, in the order in which it was added; ``memory``: all of it."""
    with _lock:
        return [r.rule for r in _rules.values() if memory or not r.memory]


def digests(log: RewriteLog) -> list[str]:
    """What tells the users' rewrites that were applied from others of their names."""
    with _lock:
        names = dict.fromkeys(fired.rule for fired in log.fired)
        return [_rules[name].digest for name in names if name in _rules]
