"""``torch.compiler.save_cache_artifacts()`` saves graphs of ours with their kernels: private
interfaces, as in ``private.py``.

What torch notes of a graph while it compiles is the entry that it also writes to its cache, pickled
while the kernels still compile. They are put into it when it is saved, so that neither a cold
start waits for them, nor a warm one on the same machine reads them.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("gems_compile.lowering.artifacts")

TYPE = "aot_autograd"


class WithKernels:
    """Stands for torch's artifact of a graph; its content is made when it is saved."""

    def __init__(self, artifact: Any) -> None:
        self.artifact, self.key = artifact, artifact.key

    def type(self) -> str:
        return TYPE

    @property
    def content(self) -> bytes:
        """The entry, pickled again outside of any compile: see ``Kept.__getstate__``."""
        plain: bytes = self.artifact.content
        try:
            return pickle.dumps(pickle.loads(plain))
        except Exception as e:
            log.warning("a graph is saved without its kernels: %s: %s", type(e).__name__, e)
            return plain


@contextlib.contextmanager
def with_kernels() -> Iterator[None]:
    """The graphs that torch notes meanwhile are saved with their kernels; its compile lock is held,
    so they are those of one compile."""
    before = len(_noted())
    try:
        yield
    finally:
        noted = _noted()
        for place in range(before, len(noted)):
            noted[place] = WithKernels(noted[place])


def _noted() -> list[Any]:
    """Torch's artifacts of graphs that it has not saved yet."""
    try:
        from torch.compiler._cache import CacheArtifactManager

        found = CacheArtifactManager._new_cache_artifacts.get(TYPE)
    except (ImportError, AttributeError) as e:
        log.info("graphs are saved without their kernels: %s", e)
        return []
    return [] if found is None else found
