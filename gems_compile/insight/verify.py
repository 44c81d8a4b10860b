"""``options={"verify": True}``: each launch beside what eager PyTorch computes, on the same values.

Launches come one by one from Python. Ahead of each the memory that its kernel reads is copied;
behind it the launch's reference (``references.py``) runs on the copies, in the graph's own dtypes
and in float64, and the results are compared (``compare.py``). The first launch that differs raises
``VerifyError``, and what it was fed is kept in a folder beside a ``replay.py``.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import cache_dir
from ..errors import VerifyError
from ..lowering.graph import value_of
from ..lowering.group import Group
from ..lowering.indexing import size_of
from ..lowering.ir import Value, is_seed
from ..lowering.pipeline import Compilation
from ..lowering.source import NUMBER
from .compare import Difference, Judge, copied
from .dump_files import Dump
from .memory import tensor_at
from .reference_text import References, Sizes, functions
from .references import Reference, find_references, names_of
from .replay_files import kernels_of, length_of, narrowest, write_replay

log = logging.getLogger(__name__)

Launcher = Callable[..., None]


@dataclass
class Verified:
    """What was compared so far. ``checked``: launches, by kernel; ``unchecked``: kernels that could
    not be, and why; ``partly``: what checked ones store beside, and why nothing is said of it."""

    checked: dict[str, int] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    partly: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{sum(self.checked.values())} launches of {len(self.checked)} kernels checked"]
        lines += [f"{name}: not checkable: {why}" for name, why in self.unchecked.items()]
        lines += [f"{name}: checked, but {why}" for name, why in self.partly.items()]
        return "\n".join(lines)


class _Call(threading.local):
    """One call of the function, in this thread."""

    sizes: Sizes
    held: dict[Value, Tensor]


class Verifier:
    """Watches the launches of one graph. ``folder``: of its dump, if there is one."""

    def __init__(self, begun: Compilation, folder: str | None) -> None:
        writer = begun.writer
        self.gm, self.program, self.device = begun.gm, writer.program, begun.device
        self.label, self.folder = begun.report.label, folder
        self.references = find_references(writer.program, writer.plan, writer.sources)
        self.group_of: dict[str, Group] = dict(writer.kernels)
        self.group_of.update(writer.widths.wide)
        self.held_at = self._held()
        self.now = _Call()
        self.programs: dict[tuple[int, str], tuple[Any, Any]] = {}
        self.told = False
        self.verified = begun.report.verified = Verified()
        for reference in self.references.values():
            self._note(reference)

    def _note(self, reference: Reference) -> None:
        """Say at once what cannot be checked."""
        if reference.why_not:
            self.verified.unchecked[reference.name] = reference.why_unchecked
        elif reference.unnamed:
            whys = dict.fromkeys(reference.unnamed.values())
            self.verified.partly[reference.name] = "; ".join(whys)

    def _held(self) -> dict[int, set[Value]]:
        """place -> memory whose contents are kept from that launch on, for a later reference; -1:
        from the call's beginning."""
        found: dict[int, set[Value]] = {}
        for reference in self.references.values():
            before = [r for r in self.references.values() if r.place < reference.place]
            for value in reference.elsewhere:
                seen = [r.place for r in before if value in (*r.loaded, *r.stored)]
                along = [place for place in seen if place in reference.after]
                found.setdefault(max(along or seen or [-1]), set()).add(value)
        return found

    # what the function calls ----------------------------------------------------------------------

    def kernels(self, kernels: Mapping[str, Launcher]) -> dict[str, Launcher]:
        return {name: self._watched(name, launch) for name, launch in kernels.items()}

    def call(self, call: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        graph = self.gm.graph

        def watched(args: list[Any]) -> Any:
            self.now.sizes, self.now.held = Sizes.of_call(graph, args), {}
            self._hold_inputs(args)
            try:
                result = call(args)
            finally:
                self.now.held = {}
            if not self.told:
                self.told = True
                log.info("graph %s: verify: %s", self.label, self.verified)
            return result

        return watched

    def _hold_inputs(self, args: Sequence[Any]) -> None:
        held = self.held_at.get(-1, ())
        for node, arg in zip(self.gm.graph.find_nodes(op="placeholder"), args, strict=True):
            value = self.program.of.get(node)
            if isinstance(value, Value) and value in held and isinstance(arg, Tensor):
                self.now.held[value] = copied(arg)

    def _watched(self, name: str, launch: Launcher) -> Launcher:
        reference = self.references[self.group_of[name]]

        def watched(x: int, y: int, z: int, stream: Any, *args: Any) -> None:
            memory = self._memory(reference, args)
            before = {v: copied(memory[v]) for v in reference.loaded}
            launch(x, y, z, stream, *args)
            for value in filter(is_seed, reference.loaded):
                before[value] = copied(memory[value])  # the kernel may have put it there
            self._check(reference, before, memory)
            for value in self.held_at.get(reference.place, ()):
                self.now.held[value] = before[value] if value in before else copied(memory[value])

        return watched

    def _memory(self, reference: Reference, args: Sequence[Any]) -> dict[Value, Tensor]:
        sizes = self.now.sizes
        found: dict[Value, Tensor] = {}
        for (_, role, what), arg in zip(reference.source.params, args, strict=True):
            if role not in ("size", NUMBER):
                shape, stride = sizes.all(what.shape), sizes.all(what.strides)
                dtype = getattr(torch, what.dtype)
                found[what] = tensor_at(arg, shape, stride, dtype, self.device)
        return found

    # comparing ------------------------------------------------------------------------------------

    def _check(
        self, reference: Reference, before: Mapping[Value, Tensor], memory: Mapping[Value, Tensor]
    ) -> None:
        if reference.why_not:
            return
        known = {**self.now.held, **before}
        try:
            judge = self._judge(reference, known)
            differences = judge.differences([memory[r.value] for r in reference.results])
        except Exception as e:  # of what eager computes, not of what we do
            reference.why_not = f"its reference fails ({type(e).__name__}: {e})"
            log.warning("graph %s: %s is not checked: %s", self.label, reference.name, e)
            self._note(reference)
            return
        if differences:
            raise VerifyError(self._message(reference, differences, known))
        checked = self.verified.checked
        checked[reference.name] = checked.get(reference.name, 0) + 1

    def _judge(self, reference: Reference, known: Mapping[Value, Tensor]) -> Judge:
        sizes = self.now.sizes
        operands = [
            known[v].reshape([sizes(size_of(n)) for n in value_of(node).shape])
            for node, v in reference.reads.items()
        ]
        operands = _alias(operands, list(reference.reads.values()))
        plain, wide = self._program(reference)
        return Judge(plain, wide, operands, narrowest(reference), length_of(reference, sizes))

    def _program(self, reference: Reference) -> tuple[Any, Any]:
        """The reference as functions, in its own dtypes and in float64, of this call's sizes."""
        writer = References(self.gm, self.program, self.now.sizes)
        text = writer.reference(reference)
        key = reference.place, text
        if key not in self.programs:
            text = f"{writer.head()}\n\n\n{text}\n"
            found = (functions(text, wide)[reference.function] for wide in (False, True))
            self.programs[key] = next(found), next(found)
        return self.programs[key]

    # telling --------------------------------------------------------------------------------------

    def _message(
        self, reference: Reference, differences: list[Difference], known: Mapping[Value, Tensor]
    ) -> str:
        names = [r.node.name for r in reference.results]
        others = [r.name for r in reference.along]
        lines = [f"graph {self.label}: {reference.name} (call {reference.place}) is not as eager:"]
        lines += [f"  output {names[d.output]}: {d}" for d in differences]
        lines += [f"  {line}" for line in reference.lines()[:4]]
        if others:
            lines.append(f"  or one of those that make what it reads: {', '.join(others)}")
        try:
            folder, command = self._keep(reference, known)
            lines += [f"  its inputs are kept in {folder}", f"  {command}"]
        except OSError as e:
            lines.append(f"  its inputs could not be kept: {e}")
        return "\n".join(lines)

    def _keep(self, reference: Reference, known: Mapping[Value, Tensor]) -> tuple[str, str]:
        """Write the launch, its reference and its inputs; the folder, and what runs them."""
        root = os.path.dirname(self.folder) if self.folder else cache_dir()
        if root is None:
            raise OSError("there is no cache directory")
        name = f"verify_{self.label}_call_{reference.place}"
        dump = Dump(root if self.folder else os.path.join(root, "verify"), name)
        alone = Reference(**{**vars(reference), "along": []})
        sizes = self.now.sizes
        data = write_replay(dump.write, self.gm, self.program, [alone], sizes, self.device)
        for file, text in kernels_of([alone]).items():
            dump.write(file, text)
        dump.write("report.json", json.dumps({"replay": data}, indent=1) + "\n")
        tensors = {}
        for value, name in names_of([alone]).items():
            if value in known:
                tensors[name] = known[value].cpu()
        path = os.path.join(dump.path, "inputs.pt")
        torch.save(tensors, path)
        replay = os.path.join(dump.path, "replay.py")
        group = f"--group {reference.name}"
        return dump.path, f"python {replay} --check {group} --inputs {path}"


def _alias(operands: list[Tensor], values: list[Value]) -> list[Tensor]:
    """Operands that are the same memory in the same shape are the same tensor."""
    first: dict[Any, Tensor] = {}
    return [first.setdefault((v, t.shape), t) for t, v in zip(operands, values, strict=True)]


__all__ = ["Verified", "Verifier"]
