"""What became of one graph, as the compiler tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .channels_last import Decision
from .cut import Captures
from .group import Group, Plan
from .runs import Run
from .source import Source
from .translate import Program
from .tune import Tuned


@dataclass
class Report:
    """What became of one graph; explain() and the benchmarks read it."""

    label: str
    given: int = 0  # nodes of the ATen graph as it came, of every kind
    nodes: int = 0  # ATen calls that are left to do
    fused: int = 0  # ATen nodes inside kernels
    kernels: int = 0  # distinct
    launches: int = 0  # a call
    aten_calls: int = 0  # a call
    peak_bytes: int | None = None  # of tensors that the function makes; None: sizes are symbolic
    aten: dict[str, int] = field(default_factory=dict)  # "op: reason" -> how often
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    plan: Plan | None = None
    sources: list[Source] = field(default_factory=list)
    source_of: dict[Group, Source] = field(default_factory=dict)
    wrapper: str = ""
    runs: list[Run] = field(default_factory=list)  # what the wrapper's r0, r1 ... launch
    constants: dict[str, str] = field(default_factory=dict)  # what the wrapper's names stand for
    graph: int = 0  # Dynamo's graphs, counted; a forward and its backward share a number
    kind: str = ""  # forward, backward or inference
    rewrites: Any = None  # RewriteLog of Dynamo's graph
    layout: Decision = field(default_factory=Decision)  # of its convolutions
    cache: str = ""  # of whole graphs: whether this came from it, went into it, or why neither
    captures: Captures | None = None  # in CUDA graphs; None where that was not asked for
    outside: Sequence[str] = ()  # of what its forward saved, what lies in no CUDA graph's memory
    tuned: list[Tuned] = field(default_factory=list)  # kernels whose tiles were measured
    found: dict[str, str] = field(default_factory=dict)  # kernel's key -> in the cache, or why not
    program: Program | None = None  # what each node became
    verified: Any = None  # what ``verify`` compared, and what it could not
