"""``python -m gems_compile cache``: what the caches hold, and ``--clear``."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from .config import cache_dir
from .lowering.choices import TILE
from .lowering.shelf import inside, kernels, remove
from .tables import Table, show

#: the module of the class that torch names in the graphs of ours that it keeps
OURS = b"gems_compile.warm"
BEGINNING = 2**16


def main(clear: bool, as_json: bool) -> int:
    found = cleared() if clear else held()
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    title = "Removed" if clear else "In the caches"
    rows: list[Sequence[Any]] = [
        (f["what"], f["where"], f["count"], f["bytes"] / 2**20, f["used"]) for f in found
    ]
    columns = ("", "where", "how many", "MB", "last used")
    show([Table(title, columns, rows) if rows else "The caches are empty."])
    return 0


def held() -> list[dict[str, Any]]:
    """A line a target and version of the package's kernels, one for the tiles that were chosen by
    measuring them, and one for whole graphs."""
    folder = cache_dir()
    lines: dict[tuple[str, str], list[Any]] = {}
    for kernel in kernels(folder) if folder is not None else []:
        lines.setdefault((kernel.target, kernel.digest), []).append(kernel)
    found = [
        _line(
            f"kernels, {target}",
            os.path.join(str(folder), "kernels", target, digest),
            [kernel.size for kernel in these],
            max(kernel.used for kernel in these),
        )
        for (target, digest), these in lines.items()
    ]
    for (target, digest), these in lines.items():
        tiles = [f for kernel in these for f in kernel.files if f.endswith(TILE)]
        if tiles:
            where = os.path.join(str(folder), "kernels", target, digest)
            found.append(_line(f"tiles, {target}", where, *_facts(tiles)))
    graphs = list(_graphs())
    if graphs:
        where = os.path.dirname(os.path.dirname(graphs[0].path))
        found.append(_line("whole graphs", where, *_facts(graphs)))
    return found


def _facts(files: Sequence[str | os.DirEntry[str]]) -> tuple[list[int], float]:
    """Their sizes, and when one was last used."""
    facts = []
    for file in files:
        with contextlib.suppress(OSError):  # it went meanwhile
            facts.append(os.stat(file))
    return [f.st_size for f in facts], max((f.st_mtime for f in facts), default=0.0)


def _line(what: str, where: str, sizes: list[int], used: float) -> dict[str, Any]:
    day = time.strftime("%Y-%m-%d", time.localtime(used))
    return {"what": what, "where": where, "count": len(sizes), "bytes": sum(sizes), "used": day}


def cleared() -> list[dict[str, Any]]:
    """Remove all of it; what it was."""
    found, folder = held(), cache_dir()
    if folder is not None:
        remove(kernels(folder))
    for entry in _graphs():
        with contextlib.suppress(OSError):
            os.unlink(entry.path)
    return found


def _graphs() -> Iterator[os.DirEntry[str]]:
    """Those of our graphs among torch's."""
    from .lowering.whole_graphs import folder

    root = folder()
    for key in inside(os.path.join(root, "aotautograd")) if root is not None else []:
        for entry in inside(key.path):
            with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                if OURS in file.read(BEGINNING):
                    yield entry
