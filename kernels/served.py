"""How an op of ours runs where no compiler took it: by its plain form, unless a layer above serves
it with kernels. That layer knows a compiler, and this one may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: (name, plain form, arguments) -> results
Server = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]

_server: Server | None = None


def serve_with(server: Server) -> None:
    """From now on ``server`` runs every call of a ``served`` op."""
    global _server
    _server = server


def served(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of ``gems::name``; ``plain`` computes the same with ATen's ops."""

    def run(*args: Any) -> Any:
        return plain(*args) if _server is None else _server(name, plain, args)

    return run
