"""What a kernel is compiled for: a target is a row of facts about one kind of device.

Importing this module imports neither torch nor Triton: compile workers read targets too.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from .op import ALL

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

log = logging.getLogger(__name__)

BUILT_IN = ("nvidia", "amd", "interpreter")
PLUG_INS = "gems_compile.targets"  # entry-point group: vendor name -> function () -> Target | None


class UnknownVendor(ValueError):
    """No target of that name is built in or plugged in."""


@dataclass(frozen=True)
class Target:
    """One kind of device.

    name:            the vendor, as ``GEMS_VENDOR`` and ``gems_compile.vendor_name`` spell it
    device:          torch's device type
    dispatch_key:    where eager mode registers its kernels
    backend:         Triton's name of its compiler; empty for the interpreter
    arch:            90 for sm_90, "gfx942"; None for the interpreter
    warp:            threads that step together
    multiprocessors: how many programs run at once, at the least
    max_persistent:  the longest row, in elements, that one program keeps on the chip
    shared:          bytes of shared memory of a multiprocessor that one program may take
    dtypes:          what kernels may load, store and compute with
    """

    name: str
    device: str
    dispatch_key: str
    backend: str
    arch: int | str | None
    warp: int
    multiprocessors: int
    max_persistent: int = 16384
    shared: int = 2**16
    dtypes: tuple[str, ...] = ALL

    @property
    def label(self) -> str:
        """Vendor and architecture in one word: ``nvidia:sm90``, ``amd:gfx942``, ``interpreter``."""
        if self.arch is None:
            return self.name
        return f"{self.name}:sm{self.arch}" if self.name == "nvidia" else f"{self.name}:{self.arch}"

    @property
    def waits(self) -> bool:
        """Whether a kernel may wait by itself for the one before it: see ``dependents``."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90

    def triton_target(self) -> GPUTarget:
        """The same device in Triton's words, as ``triton.compile(target=...)`` takes it."""
        if self.arch is None:
            raise ValueError(f"target {self.name!r} has no compiler: it names no architecture")
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp)


# More than one program at once, so that plans which split work over programs are met in tests.
INTERPRETER = Target(
    "interpreter",
    device="cpu",
    dispatch_key="CPU",
    backend="",
    arch=None,
    warp=32,
    multiprocessors=4,
)

# architecture -> multiprocessors of the largest part sold with it
MULTIPROCESSORS: dict[int | str, int] = {
    75: 72,
    80: 108,
    86: 84,
    89: 142,
    90: 132,
    100: 148,
    120: 188,
    "gfx90a": 104,
    "gfx942": 304,
    "gfx950": 256,
}

# NVIDIA architecture -> bytes of shared memory; elsewhere 64 KiB
SHARED: dict[int | str, int] = {
    80: 163 * 2**10,
    86: 99 * 2**10,
    89: 99 * 2**10,
    90: 227 * 2**10,
    100: 227 * 2**10,
    120: 99 * 2**10,
}


def compile_target(name: str, arch: int | str) -> Target:
    """A target to compile for without having one: ("nvidia", 80), ("amd", "gfx942")."""
    if name == "nvidia" and isinstance(arch, int):
        return _nvidia(arch, MULTIPROCESSORS.get(arch, 100))
    if name == "amd" and isinstance(arch, str):
        return _amd(arch, MULTIPROCESSORS.get(arch, 100))
    raise UnknownVendor(
        f"no target {name!r} with architecture {arch!r}; valid: 'nvidia' with a number "
        "(90 for sm_90), 'amd' with a name ('gfx942')"
    )


def current_target(vendor: str | None = None) -> Target | None:
    """The target of this process: ``vendor`` if given, else what is found; None without one.

    Found, in this order: Triton's interpreter where TRITON_INTERPRET=1 asked for it, a plug-in that
    sees its own device, then the GPU that torch sees. Each vendor is looked for once a process.
    """
    if vendor is None:
        return _detected()
    if vendor not in BUILT_IN and vendor not in _plug_ins():
        valid = (*BUILT_IN, *_plug_ins())
        close = difflib.get_close_matches(vendor, valid, n=1)
        raise UnknownVendor(
            f"vendor {vendor!r} (GEMS_VENDOR) is unknown; valid: {', '.join(valid)}"
            + (f"; close to it: {close[0]}" if close else "")
        )
    return _asked_for(vendor)


@cache
def _detected() -> Target | None:
    return next((target for target in _present() if target is not None), None)


def _present() -> Iterator[Target | None]:
    yield _find_interpreter()
    for name in _plug_ins():
        yield _find_plug_in(name)
    yield _find_gpu()


@cache
def _asked_for(vendor: str) -> Target | None:
    finders: dict[str, Callable[[], Target | None]] = {
        "interpreter": _find_interpreter,
        "nvidia": _find_gpu,
        "amd": _find_gpu,
    }
    target = finders[vendor]() if vendor in finders else _find_plug_in(vendor)
    if target is not None and target.name == vendor:
        return target
    way_out = (
        "set TRITON_INTERPRET=1 before Python starts"
        if vendor == "interpreter"
        else "torch sees no such device"
    )
    log.warning("vendor %r is not available here (%s); graphs run as ATen", vendor, way_out)
    return None


def _find_interpreter() -> Target | None:
    """The interpreter, if ``triton.jit`` makes interpreted functions, Triton's own included."""
    import triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    asked = bool(triton.knobs.runtime.interpret)
    # Triton's library functions are fixed at its import; a mixture of both kinds fails inside.
    loaded = not isinstance(tl.sum, JITFunction)
    if asked and not loaded:
        log.warning("TRITON_INTERPRET=1 came after Triton was imported and has no effect")
    return INTERPRETER if asked and loaded else None


def _find_gpu() -> Target | None:
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        # "gfx942:sramecc+:xnack-": the features after the colon are not part of Triton's name
        return _amd(facts.gcnArchName.split(":")[0], facts.multi_processor_count)
    return _nvidia(facts.major * 10 + facts.minor, facts.multi_processor_count)


def _nvidia(arch: int, multiprocessors: int) -> Target:
    # sm_75 and older have no bfloat16 instructions
    dtypes = ALL if arch >= 80 else tuple(name for name in ALL if name != "bfloat16")
    return Target(
        "nvidia",
        device="cuda",
        dispatch_key="CUDA",
        backend="cuda",
        arch=arch,
        warp=32,
        multiprocessors=multiprocessors,
        dtypes=dtypes,
        shared=SHARED.get(arch, 2**16),
    )


def _amd(arch: str, multiprocessors: int) -> Target:
    return Target(
        "amd",
        device="cuda",  # torch keeps CUDA's names on HIP
        dispatch_key="CUDA",
        backend="hip",
        arch=arch,
        warp=64 if arch.startswith("gfx9") else 32,
        multiprocessors=multiprocessors,
    )


@lru_cache(maxsize=1)
def _plug_ins() -> dict[str, EntryPoint]:
    found = {point.name: point for point in entry_points(group=PLUG_INS)}
    for name in set(found) & set(BUILT_IN):
        log.warning("the plugged-in target %r is ignored: that name is built in", name)
        del found[name]
    return found


def _find_plug_in(name: str) -> Target | None:
    """What a plug-in's function returns; one that fails is a warning, for it may not be wanted."""
    try:
        target = _plug_ins()[name].load()()
    except Exception as error:
        log.warning("the plugged-in target %r failed: %s: %s", name, type(error).__name__, error)
        return None
    if target is not None and not isinstance(target, Target):
        log.warning("the plugged-in target %r gave a %s, no Target", name, type(target).__name__)
        return None
    return target
