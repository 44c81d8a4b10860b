"""How an op of ours runs where no compiler took it: by its plain form, unless a layer above serves
it with kernels. That layer knows a compiler, and this one may not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: (name, plain form, arguments) -> results
Server = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]

_server: Server | None = None


def serve_with(server: Server) -> None:
    """From now on ``server`` runs every call of a ``served`` op."""
    global _server
    _server = server


class _Now(threading.local):
    plainly = False


_now = _Now()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Within, this thread's calls run by their plain forms: kernels are compared with those."""
    before, _now.plainly = _now.plainly, True
    try:
        yield
    finally:
        _now.plainly = before


def served(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of ``gems::name``; ``plain`` computes the same with ATen's ops."""

    def run(*args: Any) -> Any:
        return plain(*args) if _server is None or _now.plainly else _server(name, plain, args)

    return run
