"""Types as short text: ``f32[4, 33]``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SHORT = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
    "bool": "bool",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "complex64": "c64",
    "complex128": "c128",
}


def describe(val: Any) -> str:
    """``f32[4, 33]`` for a tensor, its parts for a tuple."""
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(map(describe, val)) + ")"
    if hasattr(val, "shape") and hasattr(val, "dtype"):
        return typed(str(val.dtype).removeprefix("torch."), val.shape)
    return "none" if val is None else type(val).__name__


def typed(dtype: str, shape: Iterable[Any]) -> str:
    return f"{SHORT.get(dtype, dtype)}[{', '.join(map(str, shape))}]"
