"""The kernel cache on disk: what is in it, and what goes when it grows too large.

``kernels/TARGET/DIGEST/KEY.*``: a kernel's source, binary and record. Those that were not used for
the longest time go first; a kernel that was used within a day stays, for a process may just have
looked it up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

log = logging.getLogger("gems_compile.lowering.shelf")

DAY_S = 24 * 3600.0
ENOUGH = 0.8  # of the bound, when there is more than it
STAMP = ".swept"

_begun: set[str] = set()


@dataclass
class Kernel:
    """The files of one kernel; ``used`` is when a process last looked it up, to a day."""

    target: str
    digest: str  # of this package's kernels
    files: list[str] = field(default_factory=list)
    size: int = 0
    used: float = 0.0


def kernels(folder: str) -> list[Kernel]:
    """What a cache directory holds, leftovers of killed processes included."""
    found: dict[tuple[str, str, str], Kernel] = {}
    for target, digest, entry in _files(os.path.join(folder, "kernels")):
        with contextlib.suppress(OSError):  # it went meanwhile
            facts = entry.stat(follow_symlinks=False)
            key = entry.name.partition(".")[0]
            kernel = found.setdefault((target, digest, key), Kernel(target, digest))
            kernel.files.append(entry.path)
            kernel.size += facts.st_size
            kernel.used = max(kernel.used, facts.st_mtime)
    return list(found.values())


def _files(folder: str) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
    for target in inside(folder):
        for digest in inside(target.path):
            for entry in inside(digest.path):
                if entry.is_file(follow_symlinks=False):
                    yield target.name, digest.name, entry


def inside(folder: str) -> list[os.DirEntry[str]]:
    """A folder's entries; none of one that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def remove(gone: list[Kernel]) -> int:
    """Remove kernels; their bytes. A record goes before the binary that it names."""
    for kernel in gone:
        for path in sorted(kernel.files, key=lambda path: not path.endswith(".json")):
            with contextlib.suppress(OSError):
                os.unlink(path)
    return sum(kernel.size for kernel in gone)


def sweep(folder: str, most: int, now: float | None = None) -> int:
    """Remove the kernels that are not used, if there is more than ``most``; their bytes."""
    now = time.time() if now is None else now
    found = kernels(folder)
    surplus = sum(kernel.size for kernel in found)
    if surplus <= most:
        return 0
    surplus -= int(most * ENOUGH)
    gone = []
    for kernel in sorted(found, key=lambda kernel: kernel.used):
        if surplus <= 0 or now - kernel.used < DAY_S:
            break
        gone.append(kernel)
        surplus -= kernel.size
    removed = remove(gone)
    log.info("the kernel cache held too much: %d of %d kernels went", len(gone), len(found))
    return removed


def sweep_now_and_then(folder: str, most: int) -> threading.Thread | None:
    """``sweep`` in the background, once a day and directory."""
    if folder in _begun:
        return None
    _begun.add(folder)
    stamp = os.path.join(folder, "kernels", STAMP)
    with contextlib.suppress(OSError):
        if time.time() - os.stat(stamp).st_mtime < DAY_S:
            return None
    try:
        with open(stamp, "w"):
            os.utime(stamp)
    except OSError:
        return None  # it cannot be written, so nothing of it can go
    thread = threading.Thread(target=sweep, args=(folder, most), daemon=True)
    thread.start()
    return thread


def touch(path: str, used: float) -> None:
    """Note that a kernel is used, once a day; ``used`` is when it last was."""
    if time.time() - used > DAY_S / 2:
        with contextlib.suppress(OSError):
            os.utime(path)
