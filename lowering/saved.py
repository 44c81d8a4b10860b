"""A compiled graph as text for another process, and back: no pickle, only JSON.

The text holds the wrapper, what its names stand for, and every kernel's source; binaries are in the
kernel cache, where they are found by their key. One that is missing there may have come along with
the text (``binaries``); else it is compiled again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .binaries import Binaries
from .binding import bind
from .channels_last import Decision
from .constants import Unsaveable, meant, spelled
from .cublas import Problem
from .cut import Captures, Piece
from .load import CompileError, Loading, shelf
from .options import Options
from .pipeline import Compilation
from .report import Report
from .runs import Launch, Multiply, Operand, Run
from .source import Source
from .worker import compiled

#: what a report says of a graph that another process compiled
COUNTS = (
    "given",
    "nodes",
    "fused",
    "kernels",
    "launches",
    "aten_calls",
    "peak_bytes",
    "aten",
    "failures",
)


@dataclass(frozen=True)
class Pointer:
    """A kernel's argument, as far as a launch must know it."""

    dtype: str


def as_text(begun: Compilation, **more: Any) -> str:
    """What ``Saved`` takes; raises ``Unsaveable``. ``more`` comes back as ``Saved.more``."""
    writer, report = begun.writer, begun.report
    if report.failures:
        raise Unsaveable(f"a part of it failed to compile ({report.failures[0]})")
    sources: dict[str, int] = {}
    texts: list[dict[str, Any]] = []

    def place(source: Source) -> int:
        if source.key not in sources:
            sources[source.key] = len(texts)
            texts.append(_source(source))
        return sources[source.key]

    kernels = {name: place(writer.sources[group]) for name, group in writer.kernels}
    wide = {name: place(begun.wide_source(group)) for name, group in writer.widths.wide}
    data = {
        "wrapper": report.wrapper,
        "device": [begun.device.type, begun.device.index],
        "constants": {name: spelled(value) for name, value in writer.constants.items()},
        "sources": texts,
        "kernels": kernels,
        "wide": wide,
        "runs": [
            {"name": run.name, "launches": [asdict(launch) for launch in run.launches]}
            for run in report.runs
        ],
        "counts": {name: getattr(report, name) for name in COUNTS},
        "layout": asdict(report.layout),
        "captures": None if report.captures is None else asdict(report.captures),
        "more": more,
    }
    return json.dumps(data)


def _source(source: Source) -> dict[str, Any]:
    name = source.name if source.like is None else source.like.name
    text = {"name": name, "text": source.text, "meta": source.meta}
    return {**text, "dtypes": source.pointer_dtypes}


def kernel_keys(text: str) -> list[str]:
    """The keys of a graph's kernels, in the kernel cache."""
    return [_restored(source).key for source in json.loads(text)["sources"]]


class Saved:
    """A graph from the cache: its kernels are looked up when this is made, and those that are
    missing, and not among the ``carried``, begin to compile. Nothing touches a GPU before ``load``.

    Raises ``Unsaveable`` where a kernel is known not to load here.
    """

    def __init__(
        self, text: str, options: Options, report: Report, carried: Binaries | None = None
    ) -> None:
        begin = time.perf_counter()
        self.carried = None if carried is None else carried.meant_for(shelf(options.target))
        self.data, self.options, self.report = json.loads(text), options, report
        kind, index = self.data["device"]
        self.device = torch.device(kind) if index is None else torch.device(kind, index)
        self.constants = {name: meant(c) for name, c in self.data["constants"].items()}
        self.sources = [_restored(source) for source in self.data["sources"]]
        self._widen()
        narrow = set(self.data["kernels"].values())
        self.loading = {k: self._begin(self.sources[k]) for k in narrow}
        self._tell()
        report.seconds["load"] = time.perf_counter() - begin

    @property
    def more(self) -> dict[str, Any]:
        return self.data["more"]

    def _widen(self) -> None:
        for name, place in self.data["wide"].items():
            narrow = self.sources[self.data["kernels"][name.removesuffix("w")]]
            narrow.widen = lambda place=place: self.sources[place]

    def _begin(self, source: Source) -> Loading:
        index = self.device.index if self.device.type != "cpu" else None
        loading = Loading(source, self.options, index, self.carried)
        why = loading.why_useless()
        if why is not None:
            raise Unsaveable(f"its kernel {source.name} is of no use here ({why})")
        return loading

    def _tell(self) -> None:
        report, data = self.report, self.data
        for name, value in data["counts"].items():
            setattr(report, name, value)
        report.layout = Decision(**data["layout"])
        report.wrapper = data["wrapper"]
        if data["captures"] is not None:
            told = data["captures"]
            report.captures = Captures(**{**told, "pieces": [Piece(**p) for p in told["pieces"]]})
        report.constants = {name: c[-1] for name, c in data["constants"].items()}
        report.runs = [_run(run) for run in data["runs"]]
        report.sources = [self.sources[k] for k in dict.fromkeys(data["kernels"].values())]

    def failure(self) -> CompileError | None:
        """Wait for the kernels that were missing; why one of them does not compile."""
        try:
            for loading in self.loading.values():
                loading.settle()
        except CompileError as e:
            return e
        return None

    def load(self) -> Callable[[list[Any]], Any]:
        """The boxed callable."""
        seconds, begin = self.report.seconds, time.perf_counter()
        kernels: dict[str, Callable[..., None]] = {}
        for name, place in self.data["kernels"].items():
            kernels[name] = self._launcher(self.loading[place])
        for name in self.data["wide"]:
            kernels[name] = self.loading[self.data["kernels"][name.removesuffix("w")]].wide
        seconds["triton"] = time.perf_counter() - begin
        code = compiled(self.report.wrapper, self.report.label)
        run = bind(
            code, self.device, self.constants, self.report.runs, kernels, self.report.captures
        )
        seconds["bind"] = time.perf_counter() - begin - seconds["triton"]
        return run

    def _launcher(self, loading: Loading) -> Callable[..., None]:
        try:
            return loading.result()
        except CompileError as e:
            loading.mark_useless(str(e))  # the next process compiles the graph, and leaves it out
            raise


def _run(run: dict[str, Any]) -> Run:
    return Run(run["name"], [_launch(launch) for launch in run["launches"]])


def _launch(launch: dict[str, Any]) -> Launch:
    operands = [Operand(*operand) for operand in launch["args"]]
    how = launch["flag"], launch["waits"]
    args = launch["kernel"], launch["name"], Operand(*launch["grid"]), operands, *how
    problem = launch.get("problem")
    return Launch(*args) if problem is None else Multiply(*args, problem=Problem.of(problem))


def _restored(source: dict[str, Any]) -> Source:
    roles = [("", "size", None) if d is None else ("", "in", Pointer(d)) for d in source["dtypes"]]
    return Source(source["name"], source["text"], roles, 0, source["meta"])
