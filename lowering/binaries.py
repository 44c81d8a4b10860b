"""Compiled kernels that travel inside a saved graph: what the kernel cache holds of each.

A graph that torch saves while it compiles holds none, for they compile meanwhile. One that a user
saves (``save_cache_artifacts``, ``aot_compile``) holds them all, and where one of them is missing
from the kernel cache of the process that loads the graph, it is put there instead of compiled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .worker import write_atomically

log = logging.getLogger("gems_compile.lowering.binaries")

#: of zlib; it makes of 73 kernels of a ResNet-50 step, 1.56 MB, 0.42 MB in 36 ms (1: 0.48 in 41)
LEVEL = 6
KINDS = ("cubin", "hsaco")


class Damaged(Exception):
    """What is wrong with a binary."""


@dataclass(frozen=True)
class Binaries:
    """The kernels of one graph, by their keys, each (record, packed binary, digest of both).

    ``shelf`` names the target and the version of this package's kernels that they were compiled
    for: they are of no use for any other.
    """

    shelf: str
    kernels: dict[str, tuple[bytes, bytes, str]]

    def state(self) -> dict[str, Any]:
        """What is pickled: plain data, in which a change of this class breaks nothing."""
        return {"shelf": self.shelf, "kernels": self.kernels}

    def with_those_of(self, others: Binaries | None) -> Binaries:
        if others is None or others.shelf != self.shelf:
            return self
        return Binaries(self.shelf, {**others.kernels, **self.kernels})

    def meant_for(self, shelf: str) -> Binaries | None:
        """These, if they are of use there."""
        if shelf == self.shelf:
            return self
        log.info("the kernels in a graph are not used: they are for %s, not %s", self.shelf, shelf)
        return None

    def put(self, key: str, text: str, folder: str) -> bool:
        """Put a kernel and its source where the kernel cache has them; whether it was among these,
        and whole."""
        if key not in self.kernels:
            return False
        try:
            record, binary, name = _unpacked(key, self.kernels[key])
            write_atomically(os.path.join(folder, f"{key}.py"), text.encode())
            write_atomically(os.path.join(folder, name), binary)
            write_atomically(os.path.join(folder, f"{key}.json"), record)
        except (Damaged, OSError) as e:
            log.warning("kernel %s in a graph is not used: %s", key, e)
            return False
        return True


def from_state(state: Any) -> Binaries | None:
    """What ``state`` made; None of anything else, which is logged."""
    if state is None:
        return None
    try:
        shelf, kernels = state["shelf"], state["kernels"]
        if isinstance(shelf, str) and all(isinstance(key, str) for key in kernels):
            return Binaries(shelf, dict(kernels))
        why = "they are not named"
    except (TypeError, KeyError, ValueError) as e:
        why = f"{type(e).__name__}: {e}"
    log.warning("the kernels in a graph are not used: %s", why)
    return None


def gathered(keys: Iterable[str], shelf: str, folders: Sequence[str]) -> Binaries:
    """What the folders hold of these kernels; those that they do not hold are left out."""
    found = {key: _packed(key, folders) for key in keys}
    return Binaries(shelf, {key: kernel for key, kernel in found.items() if kernel is not None})


def _packed(key: str, folders: Sequence[str]) -> tuple[bytes, bytes, str] | None:
    for folder in folders:
        try:
            with open(os.path.join(folder, f"{key}.json"), "rb") as file:
                record = file.read()
            with open(os.path.join(folder, _binary_name(key, record)), "rb") as file:
                binary = file.read()
        except FileNotFoundError:
            continue
        except (OSError, Damaged) as e:
            log.info("kernel %s is left out of a graph: %s", key, e)
            continue
        if binary:
            packed = zlib.compress(binary, LEVEL)
            return record, packed, _digest(record, packed)
    return None


def _unpacked(key: str, kernel: Any) -> tuple[bytes, bytes, str]:
    """Its record, its binary and the name of the binary's file."""
    try:
        record, packed, digest = kernel
        if _digest(record, packed) != digest:
            raise Damaged("its digest is another")
        return record, zlib.decompress(packed), _binary_name(key, record)
    except (TypeError, ValueError, zlib.error) as e:
        raise Damaged(f"{type(e).__name__}: {e}") from e


def _binary_name(key: str, record: bytes) -> str:
    """The name of the binary's file, which is in the record; a name of no other folder."""
    try:
        name = json.loads(record)["binary"]
    except (ValueError, KeyError, TypeError) as e:
        raise Damaged(f"its record is damaged ({type(e).__name__}: {e})") from e
    if name not in [f"{key}.{kind}" for kind in KINDS]:
        raise Damaged(f"its record names {name!r}")
    return str(name)


def _digest(record: bytes, packed: bytes) -> str:
    return hashlib.sha256(record + b"\0" + packed).hexdigest()
