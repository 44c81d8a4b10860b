"""Pointwise ops that users wrote: nodes -> Values -> calls in a kernel's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..kernels.op import BODIES, Authored, declare_authored
from .builder import common_dtype
from .indexing import size_of
from .ir import FLOATING, Declined, Value, computing_dtype, dtype_name
from .spelling import literal, parameters

if TYPE_CHECKING:
    from .builder import Builder
    from .emit import Emitter

#: the namespace of torch's registry that they are in
NAMESPACE = "gems_user"


def declare(op: Authored) -> None:
    """Let the compiler know an op, which torch knows already."""
    from . import partition

    declare_authored(op)
    partition.declared.cache_clear()


def is_authored(name: str | None) -> bool:
    """Whether a pointwise Value's op is a user's."""
    return name_of_authored(name) is not None


def name_of_authored(name: str | None) -> str | None:
    """What the user calls it."""
    op = BODIES.get(name or "")
    return op.name if isinstance(op, Authored) else None


def lower_authored(b: Builder, op: Authored, args: Sequence[Any], vals: Sequence[Any]) -> Any:
    """The Values of an op's outputs, whose FakeTensors are ``vals``."""
    promoted = [a for n, a in zip(parameters(op), args, strict=True) if n in op.promoted]
    tensors = [a for a in promoted if isinstance(a, Value)]
    dtype = computing_dtype(common_dtype(tensors, promoted)) if tensors else "float32"
    dtypes = [dtype_name(v.dtype) for v in vals]
    if "float64" in dtypes:
        dtype = "float64"
    elif op.floating and dtype not in FLOATING:
        dtype = "float32"
    given = [
        _converted(b, a, dtype if name in op.promoted else None)
        for name, a in zip(parameters(op), args, strict=True)
    ]
    made = []
    for result, val, own in zip(op.results, vals, dtypes, strict=True):
        shape, strides = [size_of(s) for s in val.shape], [size_of(s) for s in val.stride()]
        made.append(Value("pointwise", result, given, shape, own, strides=strides))
    return made


def _converted(b: Builder, a: Any, dtype: str | None) -> Any:
    """An operand in the dtype that the body has it in; None: its own, or a wider float."""
    if isinstance(a, Value):
        return a if dtype in (None, computing_dtype(a.dtype)) else b.cast(a, str(dtype))
    if not isinstance(a, (bool, int, float, str)):
        raise Declined(f"operand {a!r} is no tensor, number or text")
    return a


def emit_authored(
    emitter: Emitter,
    v: Value,
    op: Authored,
    coords: Sequence[Any],
    cond: str | None,
    level: int,
    section: tuple[str, int],
) -> str:
    """The register of a Value that one of a user's functions computes."""
    args = [
        emitter.at(a, coords, v.shape, cond, level) if isinstance(a, Value) else literal(a)
        for a in v.args
    ]
    emitter.body.definitions[op.text] = None
    text = f"{v.op}({', '.join(args)})"
    # whatever dtype it returns
    kept = f"({text}).to(tl.int1)" if v.dtype == "bool" else emitter.rounded(text, v.dtype, "", v)
    return emitter.line(section, kept, computes=v)
