"""The native launcher: ``native.c``, compiled once a machine, and the Runs that are made of it.

The C compiler is the one that Triton uses. It runs in a thread when the backend starts, and what
it made is kept among the kernels; graphs that are bound before it is ready, or where it fails, are
launched kernel by kernel from Python.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import cublas
from .load import private_directory, usable
from .private import Loaded, address_method, allocator, loaded_kernel
from .runs import INT32, Launch, Multiply, Operand, Run
from .worker import write_atomically

log = logging.getLogger("gems_compile.lowering.native")

SOURCE = Path(__file__).with_name("native.c")
HEADERS = [SOURCE.with_name(name) for name in ("cublas.h", "describe.h", "driver.h", "philox.h")]
DRIVER = "libcuda.so.1"
FLAGS = ("-O2", "-shared", "-fPIC")
MODULE = "gems_native"
SECONDS = 60  # that a compiler may take

_current: Extension | None = None  # of this process
_lock = threading.Lock()


class Unavailable(Exception):
    """Why there is no native launcher."""


class Extension:
    """The compiled ``native.c`` on its way: ``run`` is its class once it is ready, ``number_drawn``
    and ``describe`` its functions."""

    def __init__(self, cache_dir: str | None) -> None:
        self.run: Callable[..., Any] | None = None
        self.number_drawn: Callable[[int, int], int] | None = None
        self.describe: Callable[..., bool] | None = None
        self.open_blas: Callable[[str, int], Any] | None = None
        self.path, self.why = "", "it is not ready"
        self.where = cache_dir
        self.thread = threading.Thread(target=self._make, daemon=True, name="gems native launcher")
        self.thread.start()

    def wait(self) -> Extension:
        self.thread.join()
        return self

    def _make(self) -> None:
        try:
            module = self._kept_or_built()
            self.number_drawn, self.open_blas = module.number_drawn, module.open_blas
            self.describe = module.describer(torch._C.TensorBase, torch.Tensor, torch.nn.Parameter)
            self.why = ""
            self.run = module.Run  # last: who finds it may use the others
        except Exception as e:  # whatever it is, kernels can be launched without
            self.why = str(e) if isinstance(e, Unavailable) else f"{type(e).__name__}: {e}"
            log.info("kernels are launched from Python: %s", self.why)

    def _kept_or_built(self) -> Any:
        compiler = find_compiler()
        folder = os.path.join(self.where or private_directory(), "native")
        if not usable(folder):
            folder = private_directory()
        self.path = os.path.join(folder, f"{MODULE}-{digest(compiler)}.so")
        if is_whole(self.path):
            try:
                return _imported(self.path)
            except ImportError as e:  # made on a machine with another libc
                log.info("%s is built anew: %s", self.path, e)
        write_atomically(self.path, _signed(build(compiler)))
        return _imported(self.path)


def start(cache_dir: str | None) -> Extension:
    """The extension, which is made in a thread."""
    global _current
    with _lock:
        if _current is None or _current.where != cache_dir:
            _current = Extension(cache_dir)
        return _current


def _forget() -> None:
    """In a forked process: its parent's thread does not run here."""
    global _current, _lock
    _current, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# building ----------------------------------------------------------------------------------------


def find_compiler() -> list[str]:
    """The C compiler's command, looked for where Triton looks."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise Unavailable("it relies on the GIL, which this Python does not have")
    given = os.environ.get("CC")
    if given:
        return shlex.split(given)
    found = shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise Unavailable("there is no C compiler (neither CC is set, nor is there a gcc or clang)")
    return [found]


def include_folder() -> str:
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's: headers do not lie there
        scheme = "posix_prefix"
    folder = sysconfig.get_paths(scheme=scheme)["include"]
    if not os.path.exists(os.path.join(folder, "Python.h")):
        raise Unavailable(f"Python's headers are not installed (no Python.h in {folder})")
    return folder


def digest(compiler: list[str]) -> str:
    """Of all that the compiled extension depends on."""
    found = shutil.which(compiler[0])
    if found is None:
        raise Unavailable(f"the C compiler {compiler[0]} is not there")
    binary = os.stat(found)
    abi = (sysconfig.get_config_var("SOABI"), platform.machine(), FLAGS)
    told = (compiler, os.path.realpath(found), binary.st_size, binary.st_mtime_ns, abi)
    sources = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    return hashlib.sha256(sources + repr(told).encode()).hexdigest()[:24]


def build(compiler: list[str]) -> bytes:
    """The shared library."""
    include = include_folder()
    with tempfile.TemporaryDirectory(prefix="gems_") as folder:
        out = os.path.join(folder, f"{MODULE}.so")
        command = [*compiler, *FLAGS, f"-I{include}", str(SOURCE), "-o", out, "-ldl"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise Unavailable(f"the C compiler did not run: {e}") from e
        if done.returncode:
            complaint = " ".join(done.stderr.strip().splitlines()[:2])
            raise Unavailable(f"{shlex.join(compiler)} failed: {complaint[:300]}")
        return Path(out).read_bytes()


def _signed(library: bytes) -> bytes:
    """With a digest behind it, which whoever loads a library does not look at: half of one that a
    full disk left would end the process when a page is missing."""
    return library + hashlib.sha256(library).digest()


def is_whole(path: str) -> bool:
    with contextlib.suppress(OSError):
        found = Path(path).read_bytes()
        return len(found) > 32 and _signed(found[:-32]) == found
    return False


def _imported(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(MODULE, path)
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    assert spec is not None  # a loader is given
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# runs --------------------------------------------------------------------------------------------


def launcher(
    run: Run, kernels: Mapping[str, Callable[..., None]], device: torch.device
) -> Callable[..., None] | None:
    """What launches ``run`` natively; None where that cannot be."""
    extension = _current
    if extension is None or extension.run is None or device.type != "cuda":
        return None
    own = [kernels[x.kernel] for x in run.launches if not isinstance(x, Multiply)]
    loaded = [loaded_kernel(launch) for launch in own]
    try:
        known = [kernel for kernel in loaded if kernel is not None]
        if len(known) < len(loaded):  # Triton's JIT launches one of them
            return None
        blas = None
        if len(own) < len(run.launches):
            if (why := cublas.why_not(device)) is not None:
                _tell_once(f"matrix products are called from Python: {why}")
                return None
            blas = _blas(device.index or 0, extension)
        return made(extension.run, run, known, device, own, blas=blas)
    except (OSError, TypeError, ValueError, OverflowError, struct.error) as e:
        _tell_once(f"{run.name} is launched from Python: {type(e).__name__}: {e}")
        return None


@functools.cache
def _blas(device: int, extension: Extension) -> Any:
    """cuBLAS on a device."""
    assert extension.open_blas is not None  # a run of its class is made
    with torch.cuda.device(device):
        return extension.open_blas(cublas.library(), cublas.most_workspace(device))


def number_drawn() -> Callable[[int, int], int] | None:
    """``kernels.dropout.number_drawn`` natively; None where that cannot be."""
    return None if _current is None else _current.number_drawn


def describe() -> Callable[..., bool] | None:
    """``operands.describe`` natively; None where that cannot be."""
    return None if _current is None else _current.describe


def made(
    make: Callable[..., Any],
    run: Run,
    kernels: Sequence[Loaded],
    device: torch.device,
    kept: Any,
    driver: str = DRIVER,
    blas: Any = None,
) -> Callable[..., None]:
    """``run`` as an object of the extension. ``kernels``: of its launches that are no products."""

    def packed(operand: Operand) -> Any:
        if operand.text:
            return run.place(operand), operand.plus
        struct.pack("<i" if operand.kind == INT32 else "<q", operand.plus)  # or it does not fit
        return operand.plus

    def as_tuple(place: int, launch: Launch) -> tuple[Any, ...]:
        args = tuple(map(packed, launch.args))
        if isinstance(launch, Multiply):
            return (launch.name, blas, launch.problem.asked(), args)
        it = next(left)
        grid, early = packed(launch.grid), run.is_early(place)
        args += (0,) * it.nulls
        return (launch.name, it.function, grid, it.threads, it.shared, early, args)

    left = iter(kernels)
    launches = tuple(as_tuple(k, launch) for k, launch in enumerate(run.launches))
    kinds = "".join(kind for kind, _ in run.values)
    allocate = allocator(device)

    def empty(size: int) -> torch.Tensor:
        return allocate((size,), (1,), torch.uint8)

    found: Callable[..., None] = make(
        driver, device.index or 0, kinds, launches, kept, address_method(), empty
    )
    return found


@functools.cache
def _tell_once(message: str) -> None:
    log.info("%s", message)


def in_use(target: Any, cache_dir: str | None) -> str:
    """Which launcher graphs are bound to, for people."""
    if target is None or target.name == "interpreter":
        return "none: no kernel runs on a GPU"
    if target.backend != "cuda":
        return f"from Python, kernel by kernel (on {target.backend})"
    extension = start(cache_dir).wait()
    if extension.run is None:
        return f"from Python, kernel by kernel: {extension.why}"
    return f"native ({extension.path})"
