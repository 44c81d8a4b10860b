"""Sources -> launchers: a disk cache by content, a pool of compile workers, a launch function."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .binaries import Binaries, gathered
from .options import Options
from .private import static_launcher
from .shelf import sweep_now_and_then, touch
from .source import Source
from .worker import do, load_module, write_atomically

log = logging.getLogger("gems_compile.lowering.load")
Launcher = Callable[..., None]  # (grid_x, grid_y, grid_z, stream, *args), tensors as addresses


class CompileError(Exception):
    """Triton could not compile a kernel."""

    def __init__(self, source: Source, why: str) -> None:
        super().__init__(f"{source.name}: {why}")
        self.source = source


Answer = queue.Queue[str | None]  # an error, or None


class Pool:
    """Kernels compile side by side, in processes that import Triton only: see ``worker``.

    One thread asks and another takes the answers; they die with the process, and so do the workers
    (their input ends). Workers that die cost time: the next job starts new ones.
    """

    def __init__(self, size: int) -> None:
        self.size, self.closed = size, False
        self.jobs: queue.SimpleQueue[tuple[dict[str, Any], Answer]] = queue.SimpleQueue()
        self.workers: Workers | None = None
        threading.Thread(target=self._ask, daemon=True).start()

    def submit(self, job: dict[str, Any]) -> Answer:
        answer: Answer = queue.Queue(1)
        self.jobs.put((job, answer))
        return answer

    def _ask(self) -> None:
        self.workers = Workers(self.size)
        while True:
            job, answer = self.jobs.get()
            try:
                if self.workers.over and not self.closed:
                    self.workers = Workers(self.size)
                self.workers.ask(job, answer)
            except (OSError, ValueError) as e:
                answer.put(f"OSError: {e}")

    def close(self) -> None:
        self.closed = True
        if self.workers is not None:
            self.workers.process.kill()


class Workers:
    """The process that forks the workers, and what it was asked."""

    def __init__(self, size: int) -> None:
        self.asked: dict[str, list[Answer]] = {}  # by path
        self.over, self.lock = False, threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gems_compile.lowering.worker", str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_worker_environment(),
        )
        threading.Thread(target=self._answer, daemon=True).start()

    def ask(self, job: dict[str, Any], answer: Answer) -> None:
        assert self.process.stdin is not None  # a pipe
        with self.lock:
            if self.over:
                raise OSError("the compile workers died")
            self.asked.setdefault(job["path"], []).append(answer)
        with contextlib.suppress(OSError):  # who reads the answers finds out
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def _answer(self) -> None:
        assert self.process.stdout is not None  # a pipe
        for line in self.process.stdout:
            told = json.loads(line)
            with self.lock:
                answer = self.asked[told["path"]].pop(0)
            answer.put(told["error"])
        with self.lock:
            self.over = True
            left = [answer for answers in self.asked.values() for answer in answers]
        for answer in left:
            answer.put("OSError: the compile workers died")


def _worker_environment() -> dict[str, str]:
    env = dict(os.environ)
    env.pop("TRITON_INTERPRET", None)
    paths = [p for p in sys.path if p]
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    return env


@functools.cache
def pool(threads: int | None) -> Pool | None:
    """The process-wide pool; None where one core would gain nothing from it. A core is left to the
    Python that fuses meanwhile."""
    cores = os.cpu_count() or 1
    size = threads if threads is not None else min(16, cores - (cores > 2))
    if size < 2:
        return None
    made = Pool(size)
    atexit.register(made.close)
    return made


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


@functools.cache
def private_directory() -> str:
    """Where sources go when there is no cache: Triton needs a real file."""
    holder = tempfile.TemporaryDirectory(prefix="gems_")
    atexit.register(holder.cleanup)
    return holder.name


def usable(folder: str) -> bool:
    """Whether kernels can be kept there; makes the folder."""
    if os.access(folder, os.W_OK | os.X_OK):  # as for most kernels: one question is enough
        return True
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as e:
        log.warning("kernel cache unusable (%s); kernels are not kept", e)
        return False
    if not os.access(folder, os.W_OK):
        log.warning("kernel cache unusable (%s cannot be written); kernels are not kept", folder)
        return False
    return True


_launchers: dict[tuple[str, int | None], Launcher] = {}
_lock = threading.Lock()
_interpreter_lock = threading.RLock()  # the interpreter patches triton.language while it runs


@functools.cache
def library_digest() -> str:
    """A digest of the device functions that generated sources import, and of Triton."""
    import hashlib

    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    file = sys.modules["gems_compile.kernels"].__file__
    assert file is not None  # the package's __init__.py
    kernels = os.path.dirname(file)
    for name in sorted(os.listdir(kernels)):
        if name.endswith(".py"):
            with open(os.path.join(kernels, name), "rb") as f:
                digest.update(f.read())
    return digest.hexdigest()[:16]


def shelf(target: Any) -> str:
    """Where in a cache the kernels lie that these versions make for a target."""
    return os.path.join(f"{target.name}-{target.arch}", library_digest())


def kernel_folder(options: Options) -> str:
    return os.path.join(options.cache_dir or private_directory(), "kernels", shelf(options.target))


_asked: weakref.WeakValueDictionary[str, Loading] = weakref.WeakValueDictionary()  # by path


def binaries(keys: Iterable[str], options: Options, carried: Binaries | None) -> Binaries:
    """The compiled kernels, once those that compile now are ready; ``carried`` may have more."""
    keys, folders = list(keys), [kernel_folder(options), private_directory()]
    for path in [os.path.join(folder, f"{key}.py") for folder in folders for key in keys]:
        loading = _asked.get(path)
        if loading is not None:
            with contextlib.suppress(CompileError):  # whoever runs the graph is told
                loading.settle()
    return gathered(keys, shelf(options.target), folders).with_those_of(carried)


HIT, IN_PROCESS = "hit", "hit: loaded in this process"
INTERPRETED, CARRIED = "interpreted", "hit: came with the graph"


class Loading:
    """One kernel on its way: ``result()`` waits and returns its launcher.

    ``carried`` are the kernels for this target that came with the graph, from another process.
    """

    def __init__(
        self,
        source: Source,
        options: Options,
        device: int | None,
        carried: Binaries | None = None,
    ) -> None:
        self.source, self.options, self.device = source, options, device
        self.key, self.carried = source.key, carried
        self.answer: Answer | None = None
        self.compiled, self.asker = False, 0
        self.pool: Pool | None = None  # whose workers compile it
        self.error: str | None = None
        self.found = IN_PROCESS  # where the kernel came from
        self.folder = kernel_folder(options)
        self.path = os.path.join(self.folder, f"{self.key}.py")
        if (self.key, device) not in _launchers:
            self._start()

    def _start(self) -> None:
        if not usable(self.folder):
            self.folder = private_directory()
            self.path = os.path.join(self.folder, f"{self.key}.py")
        if self.options.target.name == "interpreter":
            self.found = INTERPRETED
            if not os.path.exists(self.path):
                write_atomically(self.path, self.source.text.encode())
            return
        if self._record() is not None:
            self.found = HIT
            return
        if self.options.cache_dir is not None:
            sweep_now_and_then(self.options.cache_dir, self.options.cache_bytes)
        if self._came_along():
            self.found = CARRIED
            return
        self.compiled, self.found = True, self._why_missed()
        _asked[self.path] = self
        self.pool = pool(self.options.threads)
        if self.pool is not None:
            self.answer, self.asker = self.pool.submit(self._job()), os.getpid()

    def _job(self) -> dict[str, Any]:
        target = self.options.target
        return {
            "path": self.path,
            "text": self.source.text,
            "meta": self.source.meta,
            "target": [target.backend, target.arch, target.warp],
        }

    @property
    def _mark(self) -> str:
        return self.path.removesuffix(".py") + ".useless"

    def why_useless(self) -> str | None:
        """Why an earlier process could not use the kernel, if that was so."""
        try:
            with open(self._mark, encoding="utf-8", errors="replace") as f:
                return f.read(200) or "it failed"
        except OSError:
            return None

    def mark_useless(self, why: str) -> None:
        """Let processes that find a graph with this kernel in a cache know that it is of no use.
        What may have been a full disk or a killed worker is not held against it."""
        if "OSError" not in why:
            with contextlib.suppress(OSError):
                write_atomically(self._mark, why.encode())

    def _record(self) -> dict[str, Any] | None:
        """What is known of the compiled kernel; a damaged record is a miss."""
        try:
            with open(self.path.removesuffix(".py") + ".json") as f:
                record = json.load(f)
            binary = os.path.join(self.folder, record["binary"])
            facts = os.stat(binary)
            touch(binary, facts.st_mtime)
            return {**record, "path": binary} if facts.st_size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _why_missed(self) -> str:
        if self.options.cache_dir is None or self.folder == private_directory():
            return "miss: no cache directory is used"
        file = self.path.removesuffix(".py") + ".json"
        return "miss: damaged, or its binary is gone" if os.path.exists(file) else "miss: new here"

    def _came_along(self) -> bool:
        """Whether the graph brought the kernel, which then is in the kernel cache."""
        return self.carried is not None and self.carried.put(
            self.key, self.source.text, self.folder
        )

    @functools.cached_property
    def wide(self) -> WhenNeeded:
        """What launches it where the sizes of a call ask for places of 64 bits."""
        return WhenNeeded(self)

    def result(self) -> Launcher:
        with _lock:
            launcher = _launchers.get((self.key, self.device))
            if launcher is None:
                launcher = self._load()
                _launchers[(self.key, self.device)] = launcher
        return launcher

    def settle(self) -> None:
        """Wait until the kernel is compiled, if it was not; raises CompileError."""
        with _lock:
            self._settle()

    def _settle(self) -> None:
        if self.compiled:
            asked = self.answer is not None and self.asker == os.getpid()  # or its parent did
            self.error = self.answer.get() if self.answer is not None and asked else None
            self.answer = None
            if not asked or (self.error or "").startswith("OSError"):
                try:
                    do(self._job())
                    self.error = None
                except Exception as e:
                    self.error = f"{type(e).__name__}: {e}"
            self.compiled = False
        if self.error is not None:
            raise CompileError(self.source, self.error)

    def _load(self) -> Launcher:
        if self.options.target.name == "interpreter":
            return interpreter_launcher(self.path, self.source)
        self._settle()
        record = self._record()
        if record is None and self._came_along():
            record = self._record()
        if record is None:  # somebody cleared the cache since it was found there
            self.compiled = True
            self._settle()
            record = self._record()
        if record is None:
            raise CompileError(self.source, "the compiled kernel vanished from the cache")
        try:
            return static_launcher(self.source, record, self.path, self.device)
        except torch.OutOfMemoryError as e:
            raise CompileError(self.source, str(e)) from e


class WhenNeeded:
    """Launches a kernel's form with places of 64 bits, which its first call writes and compiles."""

    def __init__(self, narrow: Loading) -> None:
        self.narrow = narrow
        self.launcher: Launcher | None = None

    def __call__(self, *args: Any) -> None:
        if self.launcher is None:
            self.launcher = self._compiled()
        self.launcher(*args)

    def _compiled(self) -> Launcher:
        narrow = self.narrow
        assert narrow.source.widen is not None  # it has a bound
        wide = narrow.source.widen()
        return Loading(wide, narrow.options, narrow.device, narrow.carried).result()


def interpreter_launcher(path: str, source: Source) -> Launcher:
    """Run the kernel's Python on the CPU through Triton's interpreter; tensors as addresses."""
    from ..kernels import interpreter

    interpreter.repair()
    function = getattr(load_module(path), source.meta["name"])
    constants = source.meta["constants"]
    dtypes = [None if d is None else getattr(torch, d) for d in source.pointer_dtypes]

    def launch(x: int, y: int, z: int, stream: Any, *args: Any) -> None:
        with _interpreter_lock:
            function[(x, y, z)](*map(_at_address, args, dtypes), **constants)

    return launch


def _at_address(value: int, dtype: Any) -> Any:
    """What the interpreter takes for a pointer: a tensor whose data starts there. It checks no
    bounds, so one element is enough."""
    if dtype is None:
        return value
    memory = (ctypes.c_char * dtype.itemsize).from_address(value)
    return torch.frombuffer(memory, dtype=dtype)
