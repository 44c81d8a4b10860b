"""Graphs whose kernels are waited for when they first run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .collection import no_collection

Boxed = Callable[[list[Any]], Any]


class Late:
    """A graph whose kernels are waited for when it is first called.

    ``otherwise`` takes the exception where ``load`` fails; without it, that is raised.
    """

    def __init__(
        self, load: Callable[[], Boxed], otherwise: Callable[[Exception], Boxed] | None = None
    ) -> None:
        self.load, self.otherwise, self.lock = load, otherwise, threading.Lock()
        self.loaded: Boxed | None = None
        self.holder: Any = None

    def boxed(self, holder: Any = None) -> Boxed:
        """What runs it; the ``run`` of ``holder`` becomes the graph itself once it is loaded."""
        self.holder = holder

        def run(args: list[Any]) -> Any:
            return (self.loaded or self.wait())(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def wait(self) -> Boxed:
        with self.lock:
            if self.loaded is None:
                with no_collection():
                    try:
                        self.loaded = self.load()
                    except Exception as e:
                        if self.otherwise is None:
                            raise
                        self.loaded = self.otherwise(e)
                del self.load, self.otherwise  # and with them the graph
                if self.holder is not None:
                    self.holder.run, self.holder = self.loaded, None
            return self.loaded
