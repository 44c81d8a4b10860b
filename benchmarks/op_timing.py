"""One call of an eager-mode op: are our numbers right, and how long do ATen's and ours take?

ATen's kernel and ours are timed in turns in one process, in one of these modes:

    kernel  device time: within a CUDA graph, inputs not in the cache (``group_timing``)
    host    what the host spends on a call, while the device has less to do than its queue holds
    call    steady calls, the slower of the two: what a program sees, and what defaults follow

A call goes through ``torch.ops``, which costs both sides the same few microseconds of the host's
time. FlagGems overrides the process's registrations, so it has a process of its own:
``python -m benchmarks.op_timing '{"cases": [...], ...}'`` prints a line of JSON a case.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import gems_compile
from benchmarks import group_timing, timing
from benchmarks.op_cases import Case, cases
from benchmarks.table import ERROR_FACTOR, Row
from gems_compile import eager

MODES = ("kernel", "host", "call")
TURNS = 3
BATCH = 256  # calls that the device's queue holds
BATCHES = 15
SMALLER = 1e-30  # a result that is 0 has no relative error


@dataclass(frozen=True)
class Setting:
    """What the cases of one run share."""

    mode: str = "kernel"
    dtype: str = "bfloat16"
    device: str = "cuda"
    seconds: float = 0.2  # of timing, of each side
    small: bool = False
    any_sizes: str = ""  # which sizes are arguments of our kernels: all, or the first of a tensor


# numbers ------------------------------------------------------------------------------------------


def tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def in_float64(values: Any, dtype: torch.dtype) -> Any:
    """Arguments of the same call on float64 tensors."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.double() if leaf.is_floating_point() else leaf
        return torch.float64 if leaf is dtype else leaf

    return tree_map(one, values)


def why_wrong(ours: Any, native: Any, exact: Any) -> str | None:
    """How our results differ from ATen's, or None; ``exact``: what ATen computes in float64.

    Integers and bools are ATen's. Floats are at most 1.2 times as far from float64 as ATen's, or
    two units in the last place, as of sums in another order; infinities and NaN are where ATen's
    are.
    """
    for k, (a, b, ref) in enumerate(
        zip(tensors(ours), tensors(native), tensors(exact), strict=True)
    ):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"result {k} is {a.dtype} {list(a.shape)}, ATen's {b.dtype} {list(b.shape)}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"result {k} has other values than ATen's"
            continue
        finite = b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(nan=0.0), b[~finite].nan_to_num(nan=0.0)):
            return f"result {k} has infinities or NaN where ATen's has none"
        if not torch.equal(a.isfinite(), finite):
            return f"result {k} has infinities or NaN where ATen's has none"
        ref = torch.where(ref.isfinite(), ref, b.double())
        error, its = (distance(t[finite], ref[finite]) for t in (a, b))
        if not error <= max(ERROR_FACTOR * its, 2 * torch.finfo(a.dtype).eps):
            return f"result {k} is {error:.1e} from float64, ATen's {its:.1e}"
    return None


def distance(found: Tensor, ref: Tensor) -> float:
    """||found - ref|| / ||ref||"""
    ref = ref.double()
    return float((found.double() - ref).norm() / ref.norm().clamp_min(SMALLER))


def why_unlikely(ours: Any, native: Any) -> str | None:
    """How random results differ from ATen's in kind: dtype, shape, mean or deviation; or None."""
    for k, (a, b) in enumerate(zip(tensors(ours), tensors(native), strict=True)):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"result {k} is {a.dtype} {list(a.shape)}, ATen's {b.dtype} {list(b.shape)}"
        mine, its = a.double(), b.double()
        spread = max(float(its.std(correction=0)), SMALLER)
        # six deviations of the difference of two means
        if abs(float(mine.mean() - its.mean())) > 6 * spread * math.sqrt(2 / max(a.numel(), 1)):
            return (
                f"result {k} has the mean {float(mine.mean()):.3g}, ATen's {float(its.mean()):.3g}"
            )
    return None


# time ---------------------------------------------------------------------------------------------


def host_us(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Microseconds of the host a call, median over batches that the device's queue holds."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < BATCHES or time.perf_counter() < end:
        timing.synchronize(device)
        start = time.perf_counter()
        for _ in range(BATCH):
            run()
        found.append((time.perf_counter() - start) / BATCH * 1e6)
        timing.synchronize(device)
        if len(found) >= 3 and time.perf_counter() > end + seconds:
            break
    return statistics.median(found)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Capture needs a stream of its own; one for all, as each holds on to memory."""
    return torch.cuda.Stream(device)


def microseconds(run: Callable[[], object], setting: Setting, random: bool) -> tuple[float, str]:
    """Of one call in the setting's mode, and how it was found."""
    device, seconds = torch.device(setting.device), setting.seconds / TURNS
    if setting.mode == "kernel" and device.type == "cuda":
        stream = side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())  # which has made the tensors
        with torch.cuda.stream(stream):
            found = group_timing.timed(run, device, seconds, random)
            torch.cuda.synchronize()
        return found["us"], found["how"]
    if setting.mode == "host" and device.type == "cuda":
        return host_us(run, device, seconds), "host"
    return timing.measure(run, device, min_seconds=seconds).median_ms * 1e3, "wall"


class Copies:
    """How fast this device copies so many bytes: what a kernel's speed is a share of."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.known: dict[int, float] = {}

    def gbps(self, moved: int) -> float:
        """Of a copy that reads and writes about as much: the nearest power of two."""
        size = max(1, round(math.log2(max(moved // 2, 2))))
        if size not in self.known:
            x = torch.zeros(2**size, dtype=torch.uint8, device=self.setting.device)
            y = torch.empty_like(x)
            us, _ = microseconds(lambda: y.copy_(x), self.setting, random=False)
            self.known[size] = 2 * x.numel() / us / 1e3
        return self.known[size]


# one case -----------------------------------------------------------------------------------------


class Measured:
    """A case's call, which ATen serves or our kernel."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case, self.setting = case, setting
        self.dtype = getattr(torch, setting.dtype)
        self.overload = eager._overloads()[case.overload]
        self.args, self.kwargs = case.make(self.dtype, torch.device(setting.device))

    def __call__(self) -> Any:
        return self.overload(*self.args, **self.kwargs)

    def serving_ours(self) -> contextlib.AbstractContextManager[Any]:
        """With our kernel, whoever enabled what."""
        return gems_compile.use_gems(only=[self.case.overload])

    def serving_atens(self) -> contextlib.AbstractContextManager[Any]:
        return gems_compile.use_gems(only=[])

    def moved(self, out: Any) -> int:
        """Bytes of its tensors and results."""
        held = [*tensors((self.args, self.kwargs)), *tensors(out)]
        return sum(t.numel() * t.element_size() for t in held)

    def ours(self) -> tuple[Any, str]:
        """The call with our kernel asked for; why it was ATen's all the same, or an empty text."""
        with self.serving_ours():
            handler = eager._state.handlers.get(self.case.overload)
            before = self._served()
            out = self()
        if handler is None:
            return out, "it has no kernel here"
        if self._served() > before:
            return out, ""
        return out, next((v.why for v in reversed(handler.variants.values()) if v.why), "unknown")

    def shared(self) -> bool:
        """Whether the kernel takes other sizes, too."""
        return any(v.shared for v in eager._state.handlers[self.case.overload].variants.values())

    def _served(self) -> int:
        return eager.stats().get(self.case.op, {}).get("ours", 0)

    def check(self) -> tuple[str, int]:
        """What is wrong with our results, or "ok"; the bytes that a call moves."""
        with self.serving_atens():
            native = self()
        ours, why_not = self.ours()
        if why_not:
            return f"ATen's: {why_not}", self.moved(native)
        why = self.why_wrong(ours, native, self.exact(native))
        return f"wrong: {why}" if why else "ok", self.moved(native)

    def why_wrong(self, found: Any, native: Any, exact: Any) -> str | None:
        """See ``why_wrong`` and ``why_unlikely``."""
        if (count := self.case.compared) is not None:
            found, native, exact = found[:count], native[:count], exact[:count]
        if self.case.random:
            return why_unlikely(found, native)
        return why_wrong(found, native, exact)

    def exact(self, native: Any) -> Any:
        """The call in float64; ATen's own results where it has no such kernel, where numbers are
        drawn, or where some results are what no call defines."""
        if self.case.random or self.case.compared is not None:
            return native
        used = next((t.dtype for t in tensors(self.args) if t.is_floating_point()), self.dtype)
        args, kwargs = in_float64((self.args, self.kwargs), used)
        try:
            return self.overload(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            return native


def measure(case: Case, setting: Setting, copies: Copies) -> Row:
    """A row: microseconds of both sides, and what they amount to; or why there are none."""
    row = {"case": case.name, "op": case.op, "family": case.family, **asdict(setting)}
    row |= {"shape": case.label, "across": case.across, "elements": case.elements()}
    row["columns"] = case.columns()
    try:
        measured = Measured(case, setting)
        row["status"], moved = measured.check()
    except Exception as error:
        return row | {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    if row["status"] != "ok":
        return row
    if setting.any_sizes:
        row["shared"] = measured.shared()
    row |= in_turns(
        measured, setting, {"eager_us": measured.serving_atens, "gems_us": measured.serving_ours}
    )
    row["ratio"] = row["eager_us"] / row["gems_us"]
    if case.whole and setting.mode != "host":
        row["gbps"] = moved / row["gems_us"] / 1e3
        row["of_copy"] = row["gbps"] / copies.gbps(moved)
    return row


def in_turns(
    measured: Measured,
    setting: Setting,
    sides: Mapping[str, Callable[[], contextlib.AbstractContextManager[Any]]],
) -> Row:
    """Each side's microseconds, the median of its turns; and how they were found."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    how = ""
    for _ in range(TURNS):
        for name, serving in sides.items():
            with serving():
                us, how = microseconds(measured, setting, measured.case.random)
            times[name].append(us)
    return {**{name: statistics.median(found) for name, found in times.items()}, "how": how}


# FlagGems -----------------------------------------------------------------------------------------


def flag_gems_rows(names: Sequence[str], setting: Setting) -> Iterator[Row]:
    """Microseconds of FlagGems' kernels and of ours, in turns in this process: in two, small calls
    differ by a microsecond whoever serves them. Wrong numbers have no time."""
    import flag_gems

    known = cases(setting.small)
    for name in names:
        row: Row = {"case": name}
        try:
            measured = Measured(known[name], setting)
            native = measured()
            with flag_gems.use_gems():
                out = measured()
            # judged without its kernels, which fail on empty operands
            if why := measured.why_wrong(out, native, native):
                row["flag_gems"] = f"wrong: {why}"
            else:
                sides = {"flag_gems_us": flag_gems.use_gems, "beside_us": measured.serving_ours}
                row |= in_turns(measured, setting, sides)
        except Exception as error:
            row["flag_gems"] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        yield row


def main(argv: Sequence[str]) -> int:
    task = json.loads(argv[0])
    names = task.pop("cases")
    for row in flag_gems_rows(names, Setting(**task)):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
