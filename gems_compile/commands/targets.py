"""``python -m gems_compile targets``: what there is to compile for, and what is chosen here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from typing import Any

from ..config import vendor
from ..kernels import target as targets
from ..kernels.target import BUILT_IN, MULTIPROCESSORS, Target
from ..tables import Table, show


@dataclass(frozen=True)
class Entry:
    """One target. ``here``: what of it this process has, ``nvidia:sm90``; None: nothing, and
    ``why``. ``compiles_for``: what its kernels can be compiled for, with or without the device."""

    name: str
    origin: str
    here: str | None
    why: str
    compiles_for: tuple[str, ...]
    chosen: bool


@dataclass(frozen=True)
class Listed:
    entries: tuple[Entry, ...]
    chosen: str | None
    because: str


def main(as_json: bool, found: Listed) -> int:
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return 0
    rows: list[Sequence[Any]] = [
        (
            "*" if e.chosen else "",
            e.name,
            e.origin,
            e.here or "-",
            f"{', '.join(e.compiles_for)}\n{e.why}",
        )
        for e in found.entries
    ]
    columns = ("", "target", "from", "here", "compiles for")
    show([Table("Targets", columns, rows), _sentence(found)])
    return 0


def _sentence(found: Listed) -> str:
    if found.chosen is None:
        return f"None is chosen: {found.because}. Graphs run as ATen."
    return f"{found.chosen} is chosen: {found.because}."


def listed() -> Listed:
    """All targets, and the one that compiles of this process use.

    Raises: UnknownVendor where GEMS_VENDOR names none of them
    """
    asked = vendor()
    chosen = targets.current_target(asked)
    entries = tuple(
        _entry(name, point, chosen)
        for name, point in {**dict.fromkeys(BUILT_IN), **targets._plug_ins()}.items()
    )
    return Listed(entries, None if chosen is None else chosen.label, _because(asked, chosen))


def _entry(name: str, point: EntryPoint | None, chosen: Target | None) -> Entry:
    if point is not None:
        found, why = targets._find_plug_in(name), "its function returned no target"
    elif name == "interpreter":
        found, why = targets._find_interpreter(), "set TRITON_INTERPRET=1 before Python starts"
    else:
        found, why = targets._find_gpu(), "torch sees no such GPU"
        found = found if found is not None and found.name == name else None
    return Entry(
        name,
        "built in" if point is None else f"plug-in {point.value}",
        None if found is None else found.label,
        "" if found is not None else f"not here: {why}",
        _compiles_for(name, found),
        found is not None and chosen is not None and found.name == chosen.name,
    )


def _compiles_for(name: str, found: Target | None) -> tuple[str, ...]:
    if name == "interpreter":
        return ("tensors of the CPU, without compiling",)
    if name == "nvidia":
        return tuple(f"sm_{arch}" for arch in MULTIPROCESSORS if isinstance(arch, int))
    if name == "amd":
        return tuple(arch for arch in MULTIPROCESSORS if isinstance(arch, str))
    return (f"{found.backend}:{found.arch}",) if found is not None else ()


def _because(asked: str | None, chosen: Target | None) -> str:
    if asked is not None:
        return f"GEMS_VENDOR={asked} asks for it" + ("" if chosen else ", and it is not here")
    if chosen is None:
        return "torch sees no GPU, no plug-in its device, and TRITON_INTERPRET=1 is not set"
    if chosen.name == "interpreter":
        return "TRITON_INTERPRET=1 asks for it, which goes before any device"
    if chosen.name in BUILT_IN:
        return "torch sees the GPU, and no plug-in a device of its own"
    return "its plug-in sees its device, which goes before what torch sees"
