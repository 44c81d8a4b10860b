"""How dtypes, literals and reductions are spelt in a kernel's text."""

from __future__ import annotations

import math
from typing import Any

from .builder import common_dtype
from .ir import FLOATING, Value, computing_dtype


class EmitError(Exception):
    """The group cannot be written as one kernel; its nodes run as ATen."""


#: combine, identity for floats, identity for integers, final reduction of a tile
REDUCTIONS = {
    "sum": ("{0} + {1}", "0", "0", "reductions.row_sum"),
    "prod": ("{0} * {1}", "1", "1", "reductions.row_prod"),
    "amax": ("reductions.larger({0}, {1})", "-inf", "min", "reductions.row_amax"),
    "amin": ("reductions.smaller({0}, {1})", "inf", "max", "reductions.row_amin"),
    "any": ("{0} | {1}", "", "0", "reductions.row_any"),
    "all": ("{0} & {1}", "", "1", "reductions.row_all"),
}


#: reductions that carry a running maximum and a sum of exponentials rescaled to it
ONLINE = ("logsumexp", "logsum", "expsum")

#: ops that say whether something holds, of numbers of any dtype; another op whose result is bool
#: computes with bools, whatever its literals (``alpha`` of a sum)
QUESTIONS = frozenset(
    ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isposinf", "isneginf", "signbit")
) | {"logical_and", "logical_or", "logical_xor", "logical_not"}

_LIMITS = {
    "int64": (-(2**63), 2**63 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "bool": (0, 1),
    "int16": (-(2**15), 2**15 - 1),
    "int8": (-128, 127),
    "uint8": (0, 255),
}


def computing_type(v: Value) -> str:
    """The dtype a pointwise op's operands are converted to."""
    if v.dtype == "bool" and v.op in QUESTIONS:
        return computing_dtype(common_dtype(v.inputs, v.args))
    if v.dtype in FLOATING:
        for a in v.inputs:
            if a.dtype == "float64" and (a.ndim or not v.ndim):
                return "float64"
    return computing_dtype(v.dtype)


def accumulator_dtype(r: Value) -> str:
    """What a reduction is summed in."""
    x = r.args[0]
    if r.op in ("any", "all"):
        return "bool"
    if r.op in ("sum", "prod", *ONLINE):
        return computing_dtype(result_dtype_of_pair(x.dtype, r.dtype))
    return computing_dtype(x.dtype)


def result_dtype_of_pair(one: str, two: str) -> str:
    if two in FLOATING or one in FLOATING:
        return "float64" if "float64" in (one, two) else "float32"
    return "int64"


def identity(op: str, dtype: str) -> str:
    """The identity of a reduction, as kernel text."""
    if op in ("argmax", "argmin"):
        op = "amax" if op == "argmax" else "amin"
    if op in ONLINE:
        return 'float("-inf")'
    _, for_float, for_int, _ = REDUCTIONS[op]
    if dtype in FLOATING:
        return f'float("{for_float}")' if "inf" in for_float else for_float
    if for_int in ("min", "max"):
        return str(_LIMITS[dtype][for_int == "max"])
    return ("False" if for_int == "0" else "True") if dtype == "bool" else for_int


def literal(value: Any) -> str:
    """A Python number as kernel text; only numbers, truth values, None and plain words pass."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str) and value.isidentifier():
        return repr(value)
    raise EmitError(f"{value!r} cannot stand in a kernel")


def whole(value: Any) -> Any:
    """A whole number as one: Triton makes no integer of 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def storage(dtype: str) -> str:
    return "int1" if dtype == "bool" else dtype


def parameters(op: Any, quick: bool = False) -> tuple[str, ...]:
    """The names of what an op's body, or its quick one, takes."""
    code = _function(op, quick).__code__
    return code.co_varnames[: code.co_argcount]


def _function(op: Any, quick: bool) -> Any:
    body = op.quick if quick else op.body
    return getattr(body, "fn", body)


def spelling(op: Any, quick: bool = False) -> tuple[str, str]:
    """(module, function) of an op's body, or of its quick one."""
    function = _function(op, quick)
    return function.__module__.rpartition(".")[2], function.__name__
