"""Source: the text of one kernel, and what the launcher must pass to it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph import source_line
from .indexing import Size
from .ir import Value

POINTER = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "float64": "*fp64",
    "bool": "*i1",
    "uint8": "*u8",
    "int8": "*i8",
    "int16": "*i16",
    "int32": "*i32",
    "int64": "*i64",
}

#: how every text begins
HEADER = "import triton\nimport triton.language as tl\n"


def preamble(bodies: Sequence[Any], also: Iterable[str] = ()) -> str:
    """How the text of a kernel that is made of ``bodies`` begins: what they import (and ``also``),
    and the users' functions that they call."""
    modules = ", ".join(sorted(set(also).union(*(b.modules for b in bodies))))
    imports = f"\nfrom gems_compile.kernels import {modules}\n" if modules else ""
    texts = dict.fromkeys(text for b in bodies for text in b.definitions)
    return HEADER + imports + "".join(f"\n\n{text}" for text in texts)


#: the role of a parameter that is the number of a seed (``seeds.py``)
NUMBER = "number"

#: the first line of a kernel that may be launched before the one ahead of it has ended
WAIT = "dependents.wait()"


@dataclass(eq=False)
class Source:
    """``text`` is a whole Python module; equal text means the same kernel.

    ``params`` are (name, role, what): role "in", "out", "size" or ``NUMBER``; what a Value or a
    size. ``grid`` is the number of programs. ``computes`` says what a line of the text computes. A
    text that was written for an equal kernel (``like``) speaks of that one's Values there and in
    ``body``; ``own`` are this kernel's. Where the sizes of a call bring ``bound`` above 32 bits,
    the kernel that ``widen`` writes runs instead; no bound: never.
    """

    name: str
    text: str
    params: list[tuple[str, str, Any]]
    grid: Size
    meta: dict[str, Any] = field(default_factory=dict)
    computes: dict[int, Value] = field(default_factory=dict)
    body: Any = None  # the Body it was rendered from
    like: Source | None = None
    own: dict[Value, Value] = field(default_factory=dict)
    bound: Size | None = None
    widen: Callable[[], Source] | None = None
    loops: int = 1  # variables that its programs count places by, where that is known
    tiling: Any = None  # the Tiling that writes it in another tile; None where there is one only

    @property
    def pointer_dtypes(self) -> list[str | None]:
        """The dtype behind each pointer argument, None of a number."""
        numbers = ("size", NUMBER)
        return [None if role in numbers else what.dtype for _, role, what in self.params]

    @functools.cached_property
    def waits(self) -> bool:
        """Whether the kernel, the last function of its text, first waits for the one before it."""
        kernel = self.text.rpartition("@triton.jit\n")[2]
        return kernel.partition("):\n")[2].lstrip().startswith(WAIT)

    @functools.cached_property
    def key(self) -> str:
        if self.like is not None:
            return self.like.key
        payload = self.text + json.dumps(self.meta, sort_keys=True)
        return hashlib.sha256(payload.encode()).hexdigest()[:24]

    @property
    def commented(self) -> str:
        """The text, with the lines of the user's code that it computes."""
        lines = self.text.split("\n")
        for place, value in self.computes.items():
            node = self.own.get(value, value).node
            comment = source_line(node) if node is not None else ""
            lines[place] += f"  # {comment}" if comment else ""
        return "\n".join(lines)


class Lines:
    """Text with indentation; ``computes`` says which line computes which Value."""

    def __init__(self) -> None:
        self.clean: list[str] = []
        self.computes: dict[int, Value] = {}
        self.depth = 0

    def add(self, text: str, computes: Value | None = None) -> None:
        if computes is not None:
            self.computes[len(self.clean)] = computes
        self.clean.append("    " * self.depth + text)

    @property
    def text(self) -> str:
        return "\n".join(self.clean) + "\n"

    def below(self, head: str) -> dict[int, Value]:
        """``computes``, where the text stands below ``head``."""
        above = head.count("\n")
        return {above + place: value for place, value in self.computes.items()}


def whole_kernel(
    name: str,
    lines: Lines,
    params: list[Any],
    grid: Size,
    warps: int,
    waits: bool,
    imports: Sequence[str] = (),
    lanes: bool = False,
) -> Source:
    """A kernel that is written as a whole, of its body; ``imports`` are modules of ``kernels``.
    ``lanes``: see ``worker.each_lane_its_own``."""
    signature = {n: "i64" if role == "size" else POINTER[t.dtype] for n, role, t in params}
    meta = {"name": name, "signature": signature, "constants": {}, "num_warps": warps}
    if lanes:
        meta["lanes"] = True
    begin = preamble([], [*imports, "dependents"] if waits else imports)
    head = f"{begin}\n\n@triton.jit\ndef {name}({', '.join(signature)}):\n"
    return Source(name, head + lines.text, params, grid, meta)
