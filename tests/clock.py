"""Processor time of a function, whatever else the machine and the process are busy with."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def processor_seconds(prepare: Callable[[], Callable[[], object]], turns: int = 3) -> float:
    """The least of ``turns`` runs of what ``prepare`` returns; ``prepare`` itself is not timed.

    Time of this process alone, as tests of other processes take the cores; without garbage
    collection, which looks at all that thousands of tests before this one have left: seconds.
    """
    took = []
    for _ in range(turns):
        run = prepare()
        gc.disable()
        try:
            start = time.process_time()
            run()
            took.append(time.process_time() - start)
        finally:
            gc.enable()
    return min(took)
