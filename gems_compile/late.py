"""Graphs whose kernels are waited for when they first run."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

Boxed = Callable[[list[Any]], Any]

#: more objects than Python 3.12 freezes as it starts (375), fewer than any program that calls
#: ``gc.freeze`` has
FROZEN_BY_PYTHON = 1000


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


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No cyclic garbage collection meanwhile: tracing allocates much that lives on, and looking
    through it again and again took a fifth of the compile time of a 64-layer model."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _call_it_old()
        gc.enable()


def _call_it_old() -> None:
    """Count what was allocated meanwhile among the old objects, which the next full collection
    looks through. As young ones they would all be looked through at the next allocation: 0.15 s
    after a ResNet-50, 0.5 s after 16 layers of Llama."""
    if gc.get_freeze_count() < FROZEN_BY_PYTHON:  # or thawing would take in what a user froze
        gc.freeze()
        gc.unfreeze()
