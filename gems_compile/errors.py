"""The exceptions a user can meet. What we cannot lower is no error: it runs as ATen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GemsError(Exception):
    """The base of everything gems-compile raises on its own account."""


class OptionError(GemsError, ValueError):
    """A mode, an option or an option's value that does not exist."""


class UnknownOp(GemsError, ValueError):
    """``enable(only=...)`` or ``ops.<name>`` names an op that no file declares."""


class AuthoringError(GemsError, TypeError):
    """A function that ``gems_compile.pointwise`` cannot take, or a call that it cannot serve."""


class RewriteError(GemsError, ValueError):
    """Two functions that ``gems_compile.rewrite`` cannot take as pattern and replacement, or whose
    numbers differ."""


class ArgumentError(GemsError, ValueError):
    """An argument that a function of ``gems_compile.llm`` does not take."""


class InternalError(GemsError, RuntimeError):
    """Our own mistake; raised under ``strict`` only, otherwise the group runs as ATen."""


class DumpError(GemsError, ValueError):
    """A folder that should hold a dump and does not, or not a whole one."""


class VerifyError(GemsError, AssertionError):
    """A kernel's result is not what eager PyTorch computes; raised with ``verify`` only."""


def nearest(found: object, valid: Iterable[str], at_most: int = 2) -> str:
    """``"; close to it: a, b"`` for the names most like ``found``, or an empty string."""
    close = difflib.get_close_matches(str(found), list(valid), n=at_most)
    return f"; close to it: {', '.join(close)}" if close else ""


def unknown(thing: str, found: object, valid: Iterable[str]) -> str:
    """One sentence: the thing, the value found, the values allowed, the nearest of them."""
    names = list(valid)
    return f"{thing} {found!r} is unknown; valid: {', '.join(names)}{nearest(found, names)}"


def __getattr__(name: str) -> Any:
    # Defined beside the targets, which import nothing of this layer; loaded when asked for.
    if name == "UnknownVendor":
        from .kernels.target import UnknownVendor

        return UnknownVendor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
