"""A wrapper's text becomes what Python runs: in a compile worker, while kernels compile there."""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
from types import CodeType

from .load import Pool, private_directory
from .worker import compiled


class Code:
    """The code of a function's text, on its way from a worker of ``pool`` if there is one.

    To compile it takes a tenth of a graph's time here, and what waits for it waits for the graph's
    kernels, too. Nothing is kept: the file that it comes in is removed when it is read.
    """

    def __init__(self, text: str, label: str, pool: Pool | None) -> None:
        self.text, self.label = text, label
        self.found: CodeType | None = None
        if pool is None:
            self.found = compiled(text, label)
            return
        digest = hashlib.sha256(f"{label}\n{text}".encode()).hexdigest()[:24]
        self.path = os.path.join(private_directory(), f"{digest}.code")
        self.asker = os.getpid()
        self.answer = pool.submit({"path": self.path, "text": text, "label": label})

    def result(self) -> CodeType:
        if self.found is None:
            self.found = self._answered() or compiled(self.text, self.label)
        return self.found

    def _answered(self) -> CodeType | None:
        """What the worker made; None where it failed, or works for another process."""
        if self.asker == os.getpid() and self.answer.get() is None:
            with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
                with open(self.path, "rb") as f:
                    code: CodeType = marshal.load(f)
                os.unlink(self.path)
                return code
        return None
