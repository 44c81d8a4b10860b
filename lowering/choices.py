"""The tiles that were the fastest, remembered on disk beside the kernels that they are of.

``KEY.WHERE.tile``: KEY is the kernel's in the tile that ``schedule`` chose, WHERE a digest of the
GPU's name and of how much a call has for it to do. The folder is a version's of this package's
kernels and of Triton. What is read there is a hint: only a tile that would have been tried is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from .schedule import Tile
from .shelf import touch
from .worker import write_atomically

log = logging.getLogger("gems_compile.lowering.tune")

#: how the names of these files end
TILE = ".tile"
#: by path: what this process has read, and written
_known: dict[str, Choice] = {}


@dataclass(frozen=True)
class Choice:
    """``times``: (tile, microseconds) of all that were measured, the scheduled one first; it is
    None of a tile that could not run."""

    tile: Tile
    times: tuple[tuple[Tile, float | None], ...] = ()


@dataclass
class Choices:
    """Those of one GPU: ``device`` is its name."""

    device: str
    known: dict[str, Choice] = field(default_factory=lambda: _known)

    def path(self, kernel: str, extent: Any) -> str:
        """Where the choice for a kernel is kept whose files are called ``kernel``; ``extent``: how
        many programs it runs, and the sizes that it is given."""
        told = json.dumps([self.device, extent])
        where = hashlib.sha256(told.encode()).hexdigest()[:12]
        return f"{kernel}.{where}{TILE}"

    def recall(self, path: str, tried: Collection[Tile]) -> Choice | None:
        """What was chosen among ``tried``, if that is known."""
        choice = self.known.get(path) or self._read(path)
        if choice is None or choice.tile not in tried:
            return None
        self.known[path] = choice
        return choice

    def keep(self, path: str, choice: Choice) -> None:
        """For later compiles and processes; where it cannot be written, for this process."""
        self.known[path] = choice
        text = json.dumps(asdict(choice))
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            write_atomically(path, text.encode())
        except OSError as e:
            log.info("a choice of tiles is not kept: %s", e)

    def _read(self, path: str) -> Choice | None:
        try:
            with open(path, encoding="utf-8") as f:
                choice = _meant(json.load(f))
            with contextlib.suppress(OSError):
                touch(path, os.stat(path).st_mtime)
            return choice
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.info("a choice of tiles is not read (%s: %s)", type(e).__name__, e)
            return None


def _meant(data: dict[str, Any]) -> Choice:
    times = tuple((_tile(tile), None if us is None else float(us)) for tile, us in data["times"])
    return Choice(_tile(data["tile"]), times)


def _tile(data: dict[str, Any]) -> Tile:
    """Raises TypeError of what is no tile."""
    if not all(type(n) in (int, bool) for n in data.values()):
        raise TypeError(f"{data} is no tile")
    return Tile(**data)


def spelled(tile: Tile) -> str:
    """A tile in a few characters: its places, warps, and loads in flight where there are more."""
    places = f"{tile.x}" if tile.r == 1 else f"{tile.x}x{tile.r}"
    flight = f", {tile.stages} stages" if tile.stages > 1 else ""
    return f"{places}, {tile.warps} warp{'s' if tile.warps > 1 else ''}{flight}"
