"""A bar on a terminal, for what takes seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

#: seconds from which on it is shown
PATIENCE = 2.0


class Progress:
    """``with Progress(n) as bar: ... bar.step(name)``; nothing is shown where standard error is no
    terminal, where rich is not installed, or where it is soon over."""

    def __init__(self, count: int, title: str = "Measuring kernels") -> None:
        self.count, self.title, self.done = count, title, 0
        self.begin = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, name: str) -> None:
        """One more is done."""
        self.done += 1
        if self.bar is None and time.monotonic() - self.begin > PATIENCE:
            self._show()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=f"{self.title}: {name}")

    def _show(self) -> None:
        if not sys.stderr.isatty():
            return
        with contextlib.suppress(ImportError):
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.title, total=self.count)
            self.bar.start()


class Waiting:
    """``with Waiting(title): ...``: a sign of life for one thing that takes long, as above."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.lock, self.over = threading.Lock(), False
        self.status: Any = None
        self.timer = threading.Timer(PATIENCE, self._show)
        self.timer.daemon = True

    def __enter__(self) -> Waiting:
        if sys.stderr.isatty():
            self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        with self.lock:
            self.over = True
            if self.status is not None:
                self.status.stop()

    def _show(self) -> None:
        with self.lock, contextlib.suppress(ImportError):
            from rich.console import Console

            if not self.over:
                self.status = Console(stderr=True).status(f"{self.title} ...")
                self.status.start()
