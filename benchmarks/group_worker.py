"""Measures fused groups in a process of its own: requests come on stdin, rows go to stdout.

Several such processes compile at once; one at a time uses the device, for timing or else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import group_cases, group_images, timing
from benchmarks.group import GROUPS, SEED, Group
from benchmarks.group_timing import timed
from benchmarks.table import ERROR_FACTOR, Row
from benchmarks.worker import compiled, free, import_backend, versions

MODULES = (group_cases, group_images)  # their import declares the groups
FLOOR_16, FLOOR_32 = 1e-4, 2e-7  # errors that count as none: far below, and about, a unit

# AOTAutograd lets a compiled backward overwrite what forward saved ("donates" it) and then refuses
# retain_graph=True. Here one forward's backward is run again and again.
functorch.donated_buffer = False


# --------------------------------------------------------------------------- what is run


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def fresh(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of the floating-point tensors, in ``dtype`` where given; integers are shared."""

    def one(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.detach().to(dtype or x.dtype, copy=True).requires_grad_(x.requires_grad)

    return tree_map(one, tree)


@dataclasses.dataclass
class Given:
    """A step's inputs, which of them the function writes, and the gradients of its outputs."""

    inputs: Any
    written: list[bool]
    dys: list[Tensor]

    @classmethod
    def make(cls, group: Group, device: torch.device, small: bool) -> Given:
        """Random inputs; gradients laid out like the outputs: normal numbers, 1 for a loss."""
        inputs = group.make(device, small)
        given = cls(inputs, [t.written for t in tree_leaves(group.declared(small))], [])
        if group.step in ("backward", "train"):
            out = [x.detach() for x in tensors(group.fn(*fresh(inputs))) if x.requires_grad]
            torch.manual_seed(SEED + 1)
            given.dys = [torch.randn_like(x) if x.ndim else torch.ones_like(x) for x in out]
        return given

    def fresh(self, dtype: torch.dtype | None = None) -> Given:
        return Given(fresh(self.inputs, dtype), self.written, fresh(self.dys, dtype))


class Step:
    """One way to take a group's timed step: ``run()`` takes it and returns what is compared.

    That is: outputs, gradients, and what the function has written. ``wrap`` compiles the function;
    ``dys`` are the gradients of the outputs. Of a backward, forward has run before.
    """

    def __init__(self, group: Group, given: Given, wrap: Callable[..., Any]) -> None:
        self.kind, self.inputs, self.dys = group.step, given.inputs, given.dys
        flat = tensors(given.inputs)
        self.leaves = [x for x in flat if x.requires_grad]
        self.written = [x for x, flag in zip(flat, given.written, strict=True) if flag]
        if group.step == "update":
            optimizer = group.fn(*self.inputs)
            optimizer.step()  # in eager mode: it makes the state
            self.inputs, self.fn = (), wrap(optimizer.step)
            self.written = [*self.leaves, *tensors(list(optimizer.state.values()))]
            return
        self.fn = wrap(group.fn)
        self.out = self.forward() if group.step == "backward" else []

    def forward(self) -> list[Tensor]:
        return tensors(self.fn(*self.inputs))

    def run(self) -> list[Tensor]:
        if self.kind == "backward":
            return self.gradients(self.out, retain=True)
        if self.kind == "train":
            out = self.forward()
            return [*out, *self.gradients(out, retain=False), *self.written]
        with torch.no_grad():
            return [*self.forward(), *self.written]

    def gradients(self, out: list[Tensor], retain: bool) -> list[Tensor]:
        out = [x for x in out if x.requires_grad]
        return list(torch.autograd.grad(out, self.leaves, self.dys, retain_graph=retain))


def without_dropout(group: Group) -> Group:
    """No two generators drop the same elements: numbers are compared with p = 0."""
    if not group.dropout:
        return group
    fn = group.fn
    return dataclasses.replace(group, fn=lambda *inputs: fn(*inputs, p=0.0))


# --------------------------------------------------------------------------- how wrong it is


def reference(group: Group, given: Given) -> list[Tensor]:
    """The results of eager mode in float64, in float32 where memory does not allow it."""

    def results(dtype: torch.dtype) -> list[Tensor]:
        return [x.detach() for x in Step(group, given.fresh(dtype), lambda fn: fn).run()]

    try:
        return results(torch.float64)
    except torch.OutOfMemoryError:
        return results(torch.float32)


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """``||found - wanted|| / ||wanted||`` of each result."""
    shapes = [[list(x.shape) for x in each] for each in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"results of shapes {shapes[0]}, eager's are {shapes[1]}")
    each = []
    for one, other in zip(found, wanted, strict=True):
        exact = other.double()
        above = torch.linalg.vector_norm(one.detach().double() - exact)
        below = torch.linalg.vector_norm(exact)
        each.append(float(above / below if below else above))
    return each


def floor(result: Tensor) -> float:
    return FLOOR_16 if result.element_size() <= 2 else FLOOR_32


def accuracy(found: list[Tensor], wanted: list[Tensor], eager: list[float]) -> Row:
    """The largest error, eager's, and which results err by more than 1.2 times eager's + floor."""
    each = errors(found, wanted)
    limits = [ERROR_FACTOR * its + floor(x) for its, x in zip(eager, found, strict=True)]
    far = [i for i, (mine, most) in enumerate(zip(each, limits, strict=True)) if not mine <= most]
    return {"error": worst(each), "eager_error": worst(eager), "inaccurate": far}


def worst(each: list[float]) -> float:
    """The largest, and NaN above all."""
    return max(each, key=lambda error: (math.isnan(error), error))


# --------------------------------------------------------------------------- one group


def generated(backend: str) -> Any:
    """How many kernels Inductor has generated so far; None of another backend."""
    if backend.partition(":")[0] != "inductor":
        return None
    from torch._inductor import metrics

    return metrics.generated_kernel_count


def gems_counts(step: str) -> Row:
    """What gems launches in a call, its kernels and ATen's as one a call; what did not compile."""
    import gems_compile

    graphs = [r for r in gems_compile.reports() if step != "backward" or r.kind == "backward"]
    launches, aten = (sum(getattr(r, key) for r in graphs) for key in ("launches", "aten_calls"))
    failures = [failure for r in graphs for failure in r.failures]
    return {"kernels": launches + aten, "aten_calls": aten, "failures": failures}


@dataclasses.dataclass
class Subject:
    """A group with its inputs, and what the right results are; ``tested`` has no dropout."""

    group: Group
    tested: Group
    given: Given
    wanted: list[Tensor]
    eager: list[float]

    @classmethod
    def of(cls, group: Group, device: torch.device, small: bool) -> Subject:
        tested = without_dropout(group)
        given = Given.make(tested, device, small)
        wanted = reference(tested, given)
        eager = Step(tested, given.fresh(), lambda fn: fn).run()
        return cls(group, tested, given, wanted, errors(eager, wanted))

    def step(self, group: Group, backend: str) -> Step:
        torch._dynamo.reset()
        return Step(group, self.given.fresh(), lambda fn: compiled(fn, backend))

    def measure(self, backend: str, seconds: float) -> Row:
        """Time, counts and accuracy through one backend."""
        group, row = self.group, {}
        step = self.step(group, backend)
        before = generated(backend)  # with the forward of a backward, but not what is timed
        found = step.run()
        if before is not None:
            row["kernels"] = generated(backend) - before
        if backend.partition(":")[0] == "gems":
            row.update(gems_counts(group.step))
        if not group.dropout:
            row.update(accuracy(found, self.wanted, self.eager))
        device = found[0].device
        del found
        draws = group.dropout and group.step != "backward"
        row.update(timed(step.run, device, seconds, random=draws))
        if group.dropout:
            del step
            found = self.step(self.tested, backend).run()
            row.update(accuracy(found, self.wanted, self.eager))
        return row


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def rows(group: Group, backends: list[str], task: Row, device: torch.device) -> Iterator[Row]:
    """One row per backend; what fails says so in its status, and the others go on."""
    small = task["small"]
    head = {"group": group.name, "step": group.step, "target": group.target, "small": small}
    head["bytes"] = group.least_bytes(small)
    subject = failed = None
    try:
        subject = Subject.of(group, device, small)
    except Exception as error:
        traceback.print_exc()
        failed = one_line(error)
    for backend in backends:
        row: Row = {**head, "backend": backend, "status": "ok"}
        try:
            if subject is None:
                row["status"] = f"failed: in eager mode: {failed}"
            else:
                row.update(subject.measure(backend, task["seconds"]))
                row["gb_s"] = row["bytes"] / row["us"] / 1e3
        except Exception as error:
            traceback.print_exc()
            row["status"] = f"failed: {one_line(error)}"
        yield {**row, **versions(device)}
        free(device)


# --------------------------------------------------------------------------- the process


class Gate:
    """One process at a time on the device: a file lock, let go while a compiler runs.

    Whoever holds it may launch kernels; compiles of the other processes need only CPUs.
    """

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):  # a lost device has nothing to wait for
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # the next process may need it
        fcntl.flock(self.file, fcntl.LOCK_UN)

    def open_while_compiling(self) -> None:
        """Dynamo says when it starts and ends, with all that the backend does in between.

        A backward that is compiled when it first runs is said, too. gems would wait for its kernels
        in the first call.
        """
        from torch._dynamo.callback import on_compile_end, on_compile_start

        def ended(_: object) -> None:
            if "gems_compile.backend" in sys.modules:
                sys.modules["gems_compile.backend"].gems.wait()
            self.__enter__()

        on_compile_start(lambda _: self.__exit__())
        on_compile_end(ended)


def alive(device: torch.device) -> bool:
    """Whether the device still answers: an illegal access ends a process's use of it."""
    try:
        timing.synchronize(device)
    except RuntimeError:
        return False
    return True


def serve() -> None:
    """Answer each line of stdin, {"group": name, "backends": [...]}, with a line per row."""
    task = json.loads(sys.argv[-1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    device = torch.device(task["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    for backend in task["backends"]:
        import_backend(backend)
    gate, stack = Gate(task["lock"]), contextlib.ExitStack()
    gate.open_while_compiling()
    if device.type == "cuda":
        # capture needs a stream of its own
        stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
    with stack:
        for line in sys.stdin:
            asked = json.loads(line)
            with gate:
                for row in rows(GROUPS[asked["group"]], asked["backends"], task, device):
                    lost = not alive(device)
                    answers.write(json.dumps({**row, "lost": lost}) + "\n")
                    answers.flush()
                    if lost:
                        return


if __name__ == "__main__":
    serve()
