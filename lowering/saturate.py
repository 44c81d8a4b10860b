"""Quantization to int8: a rounding, a clamp to int8's range and a cast are one conversion."""

from __future__ import annotations

from .ir import Value, computing_dtype


def rounded_to_int8(v: Value) -> Value | None:
    """The value whose nearest whole number in [-128, 127] the cast ``v`` is, or None."""
    if v.dtype != "int8":
        return None
    clamped = v.args[0]
    if not _is(clamped, "clamp") or clamped.args[1:] != (-128, 127):
        return None
    whole = clamped.args[0]
    return whole.args[0] if _is(whole, "round") else None


def _is(v: Value, op: str) -> bool:
    return v.kind == "pointwise" and v.op == op and computing_dtype(v.dtype) == "float32"
