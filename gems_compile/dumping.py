"""``gems_compile.dump(folder)``: which folder the compiles of a stretch of the program go to."""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar, Token
from types import TracebackType

NAME = "gems_compile.dump"

_lock = threading.Lock()
_here: ContextVar[tuple[str | None] | None] = ContextVar("gems_dump", default=None)
_everywhere: tuple[str | None] | None = None


class dump:
    """Write every stage of every compile into ``folder``, as ``GEMS_DUMP`` does; ``None``: nowhere.

    ``with gems_compile.dump("folder"): ...`` holds for compiles in the block and in its thread;
    blocks nest, and the innermost counts. ``gems_compile.dump("folder")`` by itself holds from now
    on, in all threads, until the next such call. ``options={"dump": ...}`` of a ``torch.compile``
    goes before either, and either goes before ``GEMS_DUMP``. What was compiled already is not
    compiled again for it.

    Raises: OptionError where ``folder`` is no path
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        from .config import Config

        global _everywhere
        self.folder = Config(dump=folder).dump  # type: ignore[arg-type]  # it takes any path
        self.tokens: list[Token[tuple[str | None] | None]] = []
        with _lock:
            self.before: tuple[tuple[str | None] | None] | None = (_everywhere,)
            _everywhere = (self.folder,)

    def __enter__(self) -> str | None:
        """The folder, as an absolute path."""
        global _everywhere
        with _lock:
            if self.before is not None:  # a block, and no call that stands alone
                _everywhere, self.before = self.before[0], None
        self.tokens.append(_here.set((self.folder,)))
        return self.folder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _here.reset(self.tokens.pop())

    def __repr__(self) -> str:
        return f"{NAME}({self.folder!r})"


def asked_for() -> dict[str, str | None]:
    """The option ``dump`` where ``gems_compile.dump`` decides about it here, else nothing."""
    found = _here.get() or _everywhere
    return {} if found is None else {"dump": found[0]}
