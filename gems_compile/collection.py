"""Python's garbage collection pauses while a graph compiles.

Tracing allocates much that lives on; to look through it again and again took a fifth of the compile
time of a 64-layer model, and one full collection in Dynamo a tenth of a warm start.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from torch._dynamo.callback import CallbackTrigger, callback_handler

#: more objects than Python 3.12 freezes as it starts (375), fewer than any program that calls
#: ``gc.freeze`` has
FROZEN_BY_PYTHON = 1000


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No cyclic garbage collection meanwhile, if there is one at all."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _resume()


def _resume() -> None:
    """Count what was allocated meanwhile among the old objects, which the next full collection
    looks through. As young ones they would all be looked through at the next allocation: 0.15 s
    after a ResNet-50, 0.5 s after 16 layers of Llama."""
    if gc.get_freeze_count() < FROZEN_BY_PYTHON:  # or thawing would take in what a user froze
        gc.freeze()
        gc.unfreeze()
    gc.enable()


class WhileDynamoTraces:
    """No collection while Dynamo traces for us.

    Dynamo says when it begins, and not for which backend: for ours, if the latest time was, or none
    was yet. Where another backend compiles in the same process that is wrong once.
    """

    def __init__(self) -> None:
        self.ours, self.came, self.paused = True, False, False

    def listen(self) -> None:
        """Be told by Dynamo, which forgets who listens when it is reset."""
        if self.begin not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self.begin)
            callback_handler.register_end_callback(self.end)

    def came_to_us(self) -> None:
        """What is compiled now is ours."""
        self.came = True
        self.listen()

    def begin(self, args: Any) -> None:
        self.came = False
        if self.ours and args.callback_trigger is CallbackTrigger.DYNAMO and gc.isenabled():
            gc.disable()
            self.paused = True

    def end(self, args: Any) -> None:
        if args.callback_trigger is CallbackTrigger.DYNAMO:
            self.ours = self.came
        if self.paused:
            self.paused = False
            _resume()
