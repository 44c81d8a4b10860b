"""How an op is declared: once, beside its kernel, for everyone who needs to know about it.

This module imports neither torch nor any compiler: compile workers import the op files with Triton
alone. ATen overloads are therefore written as torch prints them, ``"aten.add.Tensor"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

FLOATS = ("float16", "bfloat16", "float32")
INTS = ("int32", "int64")
NUMBERS = (*FLOATS, *INTS)
ALL = (*NUMBERS, "bool")


@dataclass(frozen=True)
class T:
    """A tensor in a sample: its shape, and how to fill it.

    ``dtype`` is the dtype under test when None; ``low`` and ``high`` bound the values (for integers
    too, as ``[low, high)``).
    """

    shape: tuple[int, ...]
    dtype: str | None
    low: float | None
    high: float | None

    def __init__(
        self,
        *shape: int,
        dtype: str | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)


@dataclass(frozen=True)
class Call:
    """The arguments of one sample call; ``T`` stands for a fresh random tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


@dataclass(frozen=True, eq=False)
class Op:
    """One declared op.

    ``kind`` is how the compiler treats it:

    - ``pointwise``: ``body`` is a Triton function on loaded tiles. Its parameters are a prefix of
      the ATen schema's; tensors arrive in the op's computing dtype (float32 for 16-bit floats),
      everything else as a compile-time constant. One more, ``nvidia``, is whether the kernel is
      one for NVIDIA's GPUs, whose assembly may stand in it.
    - ``reduction``: ``body`` names a combine of ``lowering.spelling``; the schema names the dims
      that are reduced.
    - ``composite``: ``body(b, *schema args)`` writes the op with other declared ops, in float32,
      on a ``lowering.builder.Builder``; it fuses with its neighbours like any other chain.
    """

    name: str
    kind: str
    overloads: tuple[str, ...]
    body: Any
    dtypes: tuple[str, ...]
    samples: tuple[Call, ...]
    #: names of tensor parameters that are truth values whatever the computing dtype (``where``)
    truth: tuple[str, ...] = ()
    #: parameters that index memory: they keep their own integer dtype
    index: tuple[str, ...] = ()
    declines: Callable[..., str | None] | None = None
    #: a cheaper body in float32, wrong by a few units in the last place, for a result of which
    #: only the rounding to 16 bits is seen
    quick: Any = None
    #: whether an operand without elements, which is not the first, is one that is not there
    absent: bool = False
    doc: str = field(default="", compare=False)


@dataclass(frozen=True, eq=False)
class Authored(Op):
    """A pointwise op that a user wrote: see ``gems_compile.authoring``.

    ``text`` holds the functions of ``results``, one for each output, as a kernel's text has them:
    compile workers cannot import the user's module. What ``promoted`` names is converted to the
    computing dtype, a float where ``floating``; other tensors keep their own (16-bit floats widened
    to float32).
    """

    text: str = ""
    results: tuple[str, ...] = ()
    promoted: tuple[str, ...] = ()
    floating: bool = False


OPS: dict[str, Op] = {}  # overload as torch prints it -> its op
BODIES: dict[str, Op] = {}  # the op's own name -> op


def _declare(op: Op) -> None:
    for overload in op.overloads:
        if overload in OPS:
            raise ValueError(f"{overload} is declared twice: by {OPS[overload].name} and {op.name}")
        OPS[overload] = op
    if op.name in BODIES:
        raise ValueError(f"two ops are named {op.name}")
    BODIES[op.name] = op


def declare_authored(op: Authored) -> None:
    for overload in op.overloads:
        OPS[overload] = op
    for result in op.results:
        BODIES[result] = op


def _declarator(kind: str) -> Callable[..., Callable[[Any], Any]]:
    def decorator(
        *overloads: str,
        samples: Sequence[Call] = (),
        dtypes: Sequence[str] = FLOATS,
        truth: Sequence[str] = (),
        index: Sequence[str] = (),
        declines: Callable[..., str | None] | None = None,
        quick: Any = None,
        name: str | None = None,
        absent: bool = False,
    ) -> Callable[[Any], Any]:
        def register(body: Any) -> Any:
            function = getattr(body, "fn", body)  # a jit function wraps the Python one
            op_name = name or function.__name__
            _declare(
                Op(
                    name=op_name,
                    kind=kind,
                    overloads=tuple(overloads),
                    body=body,
                    dtypes=tuple(dtypes),
                    samples=tuple(samples),
                    truth=tuple(truth),
                    index=tuple(index),
                    declines=declines,
                    quick=quick,
                    absent=absent,
                    doc=function.__doc__ or "",
                )
            )
            return body

        return register

    decorator.__doc__ = f"Declare a {kind} op: see ``Op``."
    return decorator


pointwise = _declarator("pointwise")
composite = _declarator("composite")
reduction = _declarator("reduction")
