"""Source: the text of one kernel, and what the launcher must pass to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from .indexing import Size

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


@dataclass
class Source:
    """``text`` is a whole Python module; equal text means the same kernel.

    ``params`` are (name, role, what): role "in", "out" or "size"; what a Value or a size. ``grid``
    is the number of programs.
    """

    name: str
    text: str
    commented: str
    params: list[tuple[str, str, Any]]
    grid: Size
    meta: dict[str, Any] = field(default_factory=dict)
    body: Any = None  # the Body it was rendered from

    @property
    def pointer_dtypes(self) -> list[str | None]:
        """The dtype behind each pointer argument, None of a number."""
        return [None if role == "size" else what.dtype for _, role, what in self.params]

    @property
    def key(self) -> str:
        payload = self.text + json.dumps(self.meta, sort_keys=True)
        return hashlib.sha256(payload.encode()).hexdigest()[:24]


class Lines:
    """Text with indentation; ``clean`` leaves out the comments that name the user's code."""

    def __init__(self) -> None:
        self.clean: list[str] = []
        self.commented: list[str] = []
        self.depth = 0

    def add(self, text: str, comment: str = "") -> None:
        line = "    " * self.depth + text
        self.clean.append(line)
        self.commented.append(f"{line}  # {comment}" if comment else line)
