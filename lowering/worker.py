"""The compile workers: source files in, cubins out. They import Triton, never torch.

``python -m gems_compile.lowering.worker N`` speaks JSON lines: {"path", "text", "meta", "target"}
of a kernel, {"path", "text", "label"} of a wrapper -> {"path", "error"}. It imports Triton once and
forks a process for each job, up to N at a time. When its input ends, because the process that reads
the answers did, it finishes what runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import marshal
import os
import selectors
import signal
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

#: the process that waits for kernels writes others meanwhile, and goes first where cores are short
NICE = 5


def load_module(path: str) -> Any:
    """Import a generated file (Triton reads its source back from the file)."""
    name = "gems_" + os.path.basename(path).partition(".")[0]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # for any file whose name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_atomically(path: str, data: bytes) -> None:
    temporary = f"{path}.{uuid.uuid4().hex}"
    with open(temporary, "wb") as f:
        f.write(data)
    os.replace(temporary, path)


def compile_file(path: str, meta: dict[str, Any], target: list[Any]) -> None:
    """Compile one kernel file for ``target`` = [backend, arch, warp size]; binary beside it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load_module(path), meta["name"])
    signature = dict(meta["signature"])
    names = [*signature, *meta["constants"]]
    signature.update(dict.fromkeys(meta["constants"], "constexpr"))
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, n in enumerate(names)
        if (signature[n].startswith("*") and n not in meta.get("unaligned", ()))
        or n in meta.get("multiples", ())
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): c for n, c in meta["constants"].items()},
        attrs=aligned,
    )
    options = {
        "num_warps": meta["num_warps"],
        "num_stages": meta.get("num_stages", 1),
        "enable_fp_fusion": not meta["exact"],
    }
    with each_lane_its_own() if meta.get("lanes") else contextlib.nullcontext():
        kernel = triton.compile(source, target=GPUTarget(*target), options=options)
    facts = kernel.metadata
    binary = "cubin" if target[0] == "cuda" else "hsaco"
    stem = path.removesuffix(".py")
    write_atomically(f"{stem}.{binary}", kernel.asm[binary])
    record = {
        "name": facts.name,
        "num_warps": facts.num_warps,
        "shared": facts.shared,
        "hash": kernel.hash,
        "num_ctas": getattr(facts, "num_ctas", 1),
        "global_scratch_size": getattr(facts, "global_scratch_size", None),
        "profile_scratch_size": getattr(facts, "profile_scratch_size", None),
        "binary": f"{os.path.basename(stem)}.{binary}",
    }
    write_atomically(f"{stem}.json", json.dumps(record).encode())


class _Here(threading.local):
    keeps_layouts = False


_here = _Here()


@contextlib.contextmanager
def each_lane_its_own() -> Iterator[None]:
    """In the block, this thread's compiles keep the layouts that Triton gives tiles at first: a
    lane has one element, and its neighbour the next.

    Triton's pass that looks for layouts in which accesses lie together compares each with all that
    its values come from or go to: of a window of 7 x 7 written out that takes 4.5 s of 5 (3.7).
    Without such a pass under this name nothing changes.
    """
    _let_layouts_be_kept()
    _here.keeps_layouts = True
    try:
        yield
    finally:
        _here.keeps_layouts = False


@functools.cache
def _let_layouts_be_kept() -> None:
    from triton._C.libtriton import passes

    real = getattr(getattr(passes, "ttgpuir", None), "add_coalesce", None)
    if real is None:
        return

    def add_coalesce(manager: Any) -> None:
        if not _here.keeps_layouts:
            real(manager)

    passes.ttgpuir.add_coalesce = add_coalesce


def compiled(text: str, label: str) -> CodeType:
    """A wrapper's text as Python runs it, which takes about as long as writing it did."""
    return compile(text, f"<gems {label}>", "exec")


def do(job: dict[str, Any]) -> None:
    """Write the kernel's source and compile it; or compile a wrapper into a file."""
    if "label" in job:
        write_atomically(job["path"], marshal.dumps(compiled(job["text"], job["label"])))
        return
    if not os.path.exists(job["path"]):
        write_atomically(job["path"], job["text"].encode())
    compile_file(job["path"], job["meta"], job["target"])


def answer(line: bytes) -> bytes:
    """The answer to a job, once it is done."""
    job, error = json.loads(line), None
    try:
        do(job)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"[:2000]
    return json.dumps({"path": job["path"], "error": error}).encode() + b"\n"


@dataclass
class Child:
    """A process that does a job and says the answer into a pipe."""

    process: int
    job: bytes
    said: bytes = b""


class Nursery:
    """Forks a process for each line of ``read``, up to ``size`` at a time, and writes what ``work``
    makes of the lines to ``write``; both are file descriptors. ``before`` runs before a fork."""

    def __init__(
        self,
        size: int,
        read: int,
        write: int,
        work: Callable[[bytes], bytes],
        before: Callable[[bytes], None],
    ) -> None:
        self.size, self.read, self.write = size, read, write
        self.work, self.before = work, before
        self.waiting: deque[bytes] = deque()
        self.running: dict[int, Child] = {}  # by the pipe that it answers through
        self.rest = b""  # a line's beginning
        self.selector = selectors.DefaultSelector()
        self.selector.register(read, selectors.EVENT_READ)

    def run(self) -> None:
        while self.selector.get_map():
            for key, _ in self.selector.select():
                if key.fd == self.read:
                    self._listen()
                else:
                    self._hear(key.fd)
            while self.waiting and len(self.running) < self.size:
                self._fork(self.waiting.popleft())

    def _listen(self) -> None:
        new = os.read(self.read, 2**16)
        *lines, self.rest = (self.rest + new).split(b"\n")
        self.waiting.extend(lines)
        if not new:
            self.selector.unregister(self.read)
            self.waiting.clear()

    def _fork(self, job: bytes) -> None:
        self.before(job)
        pipe, own = os.pipe()
        process = os.fork()
        if not process:
            try:
                os.write(own, self.work(job))  # a pipe holds more than an answer has
            finally:
                os._exit(0)
        os.close(own)
        self.running[pipe] = Child(process, job)
        self.selector.register(pipe, selectors.EVENT_READ)

    def _hear(self, pipe: int) -> None:
        child = self.running[pipe]
        said = os.read(pipe, 2**16)
        child.said += said
        if said:
            return
        self.selector.unregister(pipe)
        os.close(pipe)
        del self.running[pipe]
        os.waitpid(child.process, 0)
        os.write(self.write, child.said or _died(child.job))


def _died(job: bytes) -> bytes:
    error = "OSError: the process that compiled it died"
    return json.dumps({"path": json.loads(job)["path"], "error": error}).encode() + b"\n"


def prepare() -> None:
    """What each child would begin with, done once: imports (0.2 s), and the digest of Triton's own
    files (0.3 s); compiling a kernel takes 0.1 s."""
    import triton.compiler
    import triton.runtime.cache

    from ..kernels import activation, arithmetic, comparison, reductions  # noqa: F401

    with contextlib.suppress(ImportError, AttributeError):  # another Triton keeps them elsewhere
        triton.runtime.cache.triton_key()
        importlib.import_module("triton.experimental.gluon")


@functools.cache
def prepare_target(target: tuple[Any, ...]) -> None:
    """The same for a target: its backend, and the version of its assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    with contextlib.suppress(Exception):  # whoever compiles says so
        backend = make_backend(GPUTarget(*target))
        backend.hash()
        backend.parse_options({}).hash()


def prepare_job(line: bytes) -> None:
    target = json.loads(line).get("target")
    if target is not None:
        prepare_target(tuple(target))


def main(size: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; our input will end
    os.nice(NICE)
    write = os.dup(1)
    os.dup2(2, 1)  # whatever Triton prints must not mix with the answers
    prepare()
    Nursery(size, 0, write, answer, prepare_job).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
