"""A dumped graph, ready to run again: its kernels, its references, and memory for both."""

from __future__ import annotations

import json
import os
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backend import lowering_options
from ..config import Config, vendor
from ..kernels import load_ops
from ..kernels.dropout import IN_MEMORY
from ..kernels.fused import register_torch_ops
from ..kernels.target import current_target
from ..lowering.load import CompileError, Loading
from ..lowering.saved import Pointer
from ..lowering.source import NUMBER, Source
from ..lowering.tune import bandwidth
from .compare import Judge, as_eager, copied
from .reference_text import functions

Pool = dict[str, Tensor]  # contents of memory, by name
ROUNDS = 50


class CannotReplay(Exception):
    """Why nothing can be run."""


@dataclass
class Outcome:
    """What one launch did. ``what``: same, differs, not checkable, fails."""

    place: int
    name: str
    what: str
    detail: str = ""
    fed: dict[str, str] = field(default_factory=dict)


@dataclass
class Timed:
    """A call's microseconds; GB/s and share of the peak in percent where that is known."""

    place: int
    name: str
    us: float | None = None
    gbps: float | None = None
    peak: float | None = None
    eager_us: float | None = None
    detail: str = ""


class Replayed:
    """The graph of a dump's folder, on one device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.name, self.device = folder, folder.name, device
        self.data = _read(folder / "report.json").get("replay") or {}
        if not self.data:
            raise CannotReplay(f"{folder}: the whole graph runs as ATen; there is no kernel in it")
        target = current_target(vendor())
        if target is None or target.device != device.type:
            raise CannotReplay(
                f"there is no target for {device.type} here; without a GPU, set TRITON_INTERPRET=1"
            )
        load_ops()
        register_torch_ops()
        self.options = lowering_options(Config(), target)
        self.calls: list[dict[str, Any]] = self.data["calls"]
        text = (folder / "references.py").read_text(encoding="utf-8")
        self.plain, self.wide = (self._functions(text, wide) for wide in (False, True))
        self.launchers: dict[str, Callable[..., None]] = {}

    def _functions(self, text: str, wide: bool) -> dict[str, Any]:
        """The file's functions, on this device."""
        scope = functions(text, wide)
        for name, value in list(scope.items()):
            if isinstance(value, torch.device) and name.startswith(self.data["device"].upper()):
                scope[name] = self.device
        return scope

    @property
    def is_whole(self) -> bool:
        """Whether the folder has a whole graph, not one launch that ``verify`` kept."""
        return "cannot" in self.data

    def saved(self, path: str) -> Pool:
        """The tensors of a file."""
        try:
            found: Pool = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, ValueError, RuntimeError) as e:
            raise CannotReplay(f"{path}: {e}") from e
        for name, about in self.data["values"].items():
            wanted = f"{about['dtype']}{list(about['shape'])}"
            if name in found and _type(found[name]) != wanted:
                raise CannotReplay(
                    f"{path}: {name} is {_type(found[name])}, the dump's is {wanted}"
                )
        return found

    def chosen(self, group: str | None, inputs: Pool | None) -> list[dict[str, Any]]:
        """The calls that are asked for; of saved inputs those that they are enough for."""
        launches = [c for c in self.calls if c["kind"] == "kernel"]
        if group is not None:
            found = [c for c in launches if group in (c["name"], c["meta"]["name"])]
            found = found or [c for c in launches if str(c["place"]) == group]
            if not found:
                names = ", ".join(dict.fromkeys(c["name"] for c in launches))
                raise CannotReplay(f"no kernel is named {group!r}; there are: {names}")
            return found
        if inputs is not None:
            return [c for c in launches if set(c["loaded"]) <= set(inputs)]
        return self.calls

    # memory ---------------------------------------------------------------------------------------

    def random(self, name: str) -> Tensor:
        about = self.data["values"][name]
        dtype = getattr(torch, about["dtype"])
        made: Tensor = self.plain["tensor"](about["shape"], about["stride"], dtype, self.device)
        return made

    def _laid_out(self, name: str, like: Tensor) -> Tensor:
        """A value of the graph as the kernel wants it in memory."""
        about = self.data["values"][name]
        if list(like.stride()) == about["stride"] and list(like.shape) == about["shape"]:
            return like
        made = self.random(name)
        return made.copy_(like.reshape(about["shape"]))

    def _fill(self, call: dict[str, Any], pool: Pool) -> None:
        """Give a launch all that it and its reference read: what launches before it make, of that;
        else random values."""
        needs = [*call["loaded"], *(r["value"] for r in call["reads"])]
        if all(name in pool for name in needs):
            return
        for place in call["after"]:
            before = next(c for c in self.calls if c["place"] == place)
            for name in (*before["loaded"], *(r["value"] for r in before["reads"])):
                if name not in pool:
                    pool[name] = self.random(name)
            pool.update(self.launch(before, pool))
        for name in needs:
            if name not in pool:
                pool[name] = self.random(name)

    def _blank(self, name: str) -> Tensor:
        """Memory that nobody wrote yet."""
        made = self.random(name)
        return made.fill_(float("nan") if made.is_floating_point() else 1)

    # running --------------------------------------------------------------------------------------

    def launcher(self, call: dict[str, Any]) -> Callable[..., None]:
        file = call["file"]
        if file not in self.launchers:
            text = (self.folder / file).read_text(encoding="utf-8")
            params: list[tuple[str, str, Any]] = [
                ("", "size", None) if dtype is None else ("", "in", Pointer(dtype))
                for dtype in call["dtypes"]
            ]
            source = Source(call["name"], text, params, call["grid"], call["meta"])
            index = (self.device.index or 0) if self.device.type == "cuda" else None
            self.launchers[file] = Loading(source, self.options, index).result()
        return self.launchers[file]

    def prepared(self, call: dict[str, Any], pool: Pool) -> tuple[Callable[[], None], Pool]:
        """(what launches the kernel, the memory that it reads and writes)."""
        memory = {name: copied(pool[name]) for name in call["loaded"]}
        for name in call["stored"]:
            if name not in memory:
                memory[name] = self._blank(name)
        args = [self._argument(p, memory) for p in call["params"]]
        launch, stream = self.launcher(call), None
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
        grid = call["grid"]
        return (lambda: launch(grid, 1, 1, stream, *args) if grid else None), memory

    @staticmethod
    def _argument(param: dict[str, Any], memory: Pool) -> int:
        if param["role"] == "size":
            return int(param["value"])
        return IN_MEMORY if param["role"] == NUMBER else memory[param["value"]].data_ptr()

    def launch(self, call: dict[str, Any], pool: Pool) -> Pool:
        """What the launch leaves in the memory that it writes."""
        run, memory = self.prepared(call, pool)
        run()
        return {name: memory[name] for name in call["stored"]}

    def operands(self, call: dict[str, Any], pool: Pool) -> list[Tensor]:
        """What a reference takes."""
        made: dict[Any, Tensor] = {}
        for r in call["reads"]:
            key = r["value"], tuple(r["shape"])
            made.setdefault(key, pool[r["value"]].reshape(r["shape"]))
        return [made[r["value"], tuple(r["shape"])] for r in call["reads"]]

    # checking -------------------------------------------------------------------------------------

    def check(self, call: dict[str, Any], pool: Pool) -> Outcome:
        """A launch against its reference, both of what ``pool`` has, which gets what is missing."""
        outcome = Outcome(call["place"], call["name"], "not checkable")
        why = call["why_not"] or call["cannot"]
        if why:
            outcome.detail = why
            return outcome
        try:
            self._fill(call, pool)
            outcome.fed = {name: _told(pool[name]) for name in call["loaded"]}
            stored = self.launch(call, pool)
        except (CompileError, RuntimeError, TypeError, ValueError, IndexError) as e:
            outcome.what, outcome.detail = "fails", f"{type(e).__name__}: {e}"
            return outcome
        try:
            plain, wide = self.plain[call["function"]], self.wide[call["function"]]
            judge = Judge(plain, wide, self.operands(call, pool), call["eps"], call["length"])
            found = judge.differences([stored[r["value"]] for r in call["results"]])
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as e:  # an op that has no such form
            outcome.detail = f"its reference fails ({type(e).__name__}: {e})"
            return outcome
        names = [r["node"] for r in call["results"]]
        outcome.what = "differs" if found else "same"
        told = [f"{names[d.output]}: {d}" for d in found]
        told += [f"{name} is not checked: {why}" for name, why in call["unnamed"].items()]
        outcome.detail = "\n".join([*told, *(call["lines"] if found else ())])
        return outcome

    def bisect(self, inputs: Pool | None) -> list[Outcome]:
        """The launches in order, fed with what eager computes, up to the first that differs."""
        if not self.is_whole:
            raise CannotReplay("this folder has one launch, not a graph")
        if self.data["cannot"]:
            raise CannotReplay(f"the graph does not run by itself: {self.data['cannot']}")
        eager = self._eager(inputs or {})
        pool: Pool = {}
        for name, about in self.data["values"].items():
            value = eager.get(about["node"])
            if value is not None and value.numel() == _count(about["shape"]):
                pool[name] = self._laid_out(name, value)
        outcomes = []
        for call in self.calls:
            if call["kind"] == "kernel":
                outcomes.append(self.check(call, pool))
                if outcomes[-1].what in ("differs", "fails"):
                    break
                self._go_on(call, pool, eager)
        return outcomes

    def _go_on(self, call: dict[str, Any], pool: Pool, eager: Pool) -> None:
        """Take over from a launch what eager has no name for, and what it wrote over."""
        nodes = self.data["values"]
        if not set(call["loaded"]) <= set(pool):
            return
        for name, value in self.launch(call, pool).items():
            if name in call["loaded"] or nodes[name]["node"] not in eager:
                pool[name] = value

    def _eager(self, inputs: Pool) -> Pool:
        """Every value of the graph, of random inputs or of those that are given."""
        torch.manual_seed(0)
        made = self.plain["make_inputs"]()
        names = self.data.get("inputs", [])
        for k, name in enumerate(names):
            if name in inputs:
                made[k] = inputs[name]
        found: Pool = {}
        try:
            with as_eager():
                self.plain["graph"](made, lambda name, value: found.update({name: copied(value)}))
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            raise CannotReplay(f"eager cannot run the graph here: {type(e).__name__}: {e}") from e
        return found

    # timing ---------------------------------------------------------------------------------------

    def bench(self, calls: Sequence[dict[str, Any]], pool: Pool) -> list[Timed]:
        return [self._timed(call, pool) for call in calls]

    def _timed(self, call: dict[str, Any], pool: Pool) -> Timed:
        timed = Timed(call["place"], call["name"])
        try:
            if call["kind"] == "aten":
                self._time_aten(call, timed)
            else:
                self._time_kernel(call, dict(pool), timed)
        except (CompileError, RuntimeError, TypeError, ValueError, IndexError) as e:
            timed.detail = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        return timed

    def _time_aten(self, call: dict[str, Any], timed: Timed) -> None:
        if call["cannot"]:
            timed.detail = call["cannot"]
            return
        operands = self.plain[f"operands_{call['place']}"]()
        with as_eager():
            timed.us = timed.eager_us = self._us(lambda: self.plain[call["function"]](*operands))

    def _time_kernel(self, call: dict[str, Any], pool: Pool, timed: Timed) -> None:
        self._fill(call, pool)
        run, memory = self.prepared(call, pool)
        timed.us = self._us(run)
        moved = sum(t.numel() * t.element_size() for t in memory.values())
        if self.device.type == "cuda":
            timed.gbps = moved / timed.us / 1e3
            timed.peak = 100 * timed.gbps * 1e9 / bandwidth(self.device)
        why = call["why_not"] or call["cannot"]
        if why:
            timed.detail = f"no reference: {why}"
            return
        operands = self.operands(call, {n: copied(t) for n, t in pool.items()})
        with as_eager():
            timed.eager_us = self._us(lambda: self.plain[call["function"]](*operands))

    def _us(self, run: Callable[[], Any]) -> float:
        """The median of some runs, in microseconds; on a GPU with its second-level cache cold."""
        run()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e6
        size = torch.cuda.get_device_properties(self.device).L2_cache_size
        cache = torch.empty(max(2 * size, 2**22), dtype=torch.int8, device=self.device)
        pairs = []
        for _ in range(ROUNDS):
            cache.zero_()
            begin_, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin_.record()
            run()
            end.record()
            pairs.append((begin_, end))
        torch.cuda.synchronize(self.device)
        return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3

    def write_times(self, us: list[float | None]) -> None:
        """Note the times of all calls, in order, in the dump's ``times.json``."""
        path = self.folder.parent / "times.json"
        known = _read(path) if path.exists() else {}
        partial = path.with_name(f"times.json.{uuid.uuid4().hex[:8]}.tmp")
        partial.write_text(json.dumps({**known, self.name: us}, indent=1) + "\n")
        os.replace(partial, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CannotReplay(f"{path}: {e}") from e
    return found


def _count(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _type(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def _told(t: Tensor) -> str:
    """What a tensor is like."""
    text = _type(t)
    if not t.numel():
        return text
    if not t.is_floating_point():
        return f"{text} from {t.min().item()} to {t.max().item()}"
    finite = t[t.isfinite()].double()
    odd = t.numel() - finite.numel()
    if not finite.numel():
        return f"{text}, none finite"
    told = f"{text} from {finite.min().item():.4g} to {finite.max().item():.4g}"
    return f"{told}, {odd} not finite" if odd else told
