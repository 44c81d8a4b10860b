"""The calls of eager mode's ops that are timed: each overload at the sizes of its family.

Calls of pointwise ops and of reductions follow from their declarations: a sample's numbers at the
benchmark's sizes, and the dims that a schema names; those of lists from their schemas, in
``list_table``. Those of other ops are written in ``op_table``, ``conv_table`` and
``attention_table``. A call is written as a sample is, with ``T`` for a random tensor; ``Filled`` is
one whose numbers must be sorted, or distinct, and ``Given`` one that a function makes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.group import spell
from gems_compile import eager
from gems_compile.calls.one_call import aten_name
from gems_compile.kernels.op import OPS, Call, T, call

SEED = 1234
FAMILIES = ("pointwise", "reduction", "scan", "softmax", "norm", "loss", "indexing", "layout")
FAMILIES += ("product", "image", "order", "random", "factory", "list")
# stand for the dtype and the device under test
INPUT_DTYPE, INPUT_DEVICE = "input_dtype", "input_device"


@dataclass(frozen=True)
class Filled:
    """Numbers that are no independent draws: ``sorted`` ones from -3 to 3, or a ``permutation`` of
    the places of each row."""

    how: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Given:
    """A tensor that a function makes, of the dtype and on the device under test."""

    shape: tuple[int, ...]
    make: Callable[[torch.dtype, torch.device], Tensor]


@dataclass(frozen=True)
class Sizes:
    """The shapes that families share, of a GPU's benchmark or of a test on a CPU."""

    flat: int
    short: int
    matrices: tuple[tuple[int, int], ...]  # of what works on rows; the first is everyone's
    image: tuple[int, int, int, int]
    volume: tuple[int, int, int, int, int]
    signal: tuple[int, int, int]
    square: int
    table: tuple[int, int]  # of an embedding
    tokens: int
    groups: int

    @property
    def matrix(self) -> tuple[int, int]:
        return self.matrices[0]


FULL = Sizes(
    flat=2**24,
    short=2**14,
    matrices=((8192, 4096), (8192, 1024), (4096, 32768), (64, 4096)),
    image=(32, 128, 64, 64),
    volume=(4, 32, 32, 64, 64),
    signal=(64, 64, 4096),
    square=4096,
    table=(32768, 1024),
    tokens=8192,
    groups=32,
)
SMALL = Sizes(
    flat=130,
    short=34,
    matrices=((6, 34), (3, 5)),
    image=(2, 4, 6, 6),
    volume=(1, 2, 4, 6, 6),
    signal=(2, 3, 10),
    square=9,
    table=(11, 6),
    tokens=8,
    groups=2,
)


@dataclass(frozen=True)
class Case:
    """One call of an overload (named as torch prints it).

    label:  its size in a name
    across: it works over another dim than the last
    whole:  it reads all of its tensors, so that their bytes say how fast it is
    compared: so many of its results; others hold nothing that a call defines (None: all)
    """

    overload: str
    family: str
    label: str
    call: Call
    across: bool = False
    whole: bool = True
    compared: int | None = None

    @property
    def op(self) -> str:
        return aten_name(eager._overloads()[self.overload])

    @property
    def name(self) -> str:
        return f"{self.op}-{self.label}"

    @property
    def random(self) -> bool:
        seeded = torch.Tag.nondeterministic_seeded in eager._overloads()[self.overload].tags
        return seeded and self.compared is None  # attention without dropout draws nothing

    def elements(self) -> int:
        """Of its largest tensor."""
        return max(
            (math.prod(t.shape) for t in tree_leaves(self.call.args) if _drawn(t)), default=0
        )

    def columns(self) -> int:
        """The length of its first tensor's last dim."""
        shape = next((t.shape for t in tree_leaves(self.call.args) if _drawn(t)), ())
        return shape[-1] if shape else 1

    def make(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keywords, the same numbers every time."""
        torch.manual_seed(SEED)
        kinds = OPS[self.overload].dtypes if self.overload in OPS else ()
        if kinds and str(dtype).removeprefix("torch.") not in kinds:
            dtype = getattr(torch, kinds[0])

        def one(leaf: Any) -> Any:
            if _drawn(leaf):
                return fill(leaf, dtype, device)
            if leaf == INPUT_DTYPE:
                return dtype
            if leaf == INPUT_DEVICE:
                return device
            named = getattr(torch, leaf, None) if isinstance(leaf, str) else None
            return named if isinstance(named, torch.dtype) else leaf

        return tree_map(one, (list(self.call.args), dict(self.call.kwargs)))


def _drawn(leaf: Any) -> bool:
    return isinstance(leaf, (T, Filled, Given))


def fill(spec: T | Filled | Given, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers where no bounds are given, else uniform ones, integers within the bounds."""
    if isinstance(spec, Given):
        return spec.make(dtype, device)
    if isinstance(spec, Filled):
        drawn = torch.rand(spec.shape, device=device)
        if spec.how == "permutation":
            return drawn.argsort(-1)
        return torch.linspace(-3, 3, math.prod(spec.shape), device=device).to(dtype)
    kind = dtype if spec.dtype is None else getattr(torch, spec.dtype)
    if kind == torch.bool:
        return torch.rand(spec.shape, device=device) > 0.5
    if not kind.is_floating_point:
        low = -9 if spec.low is None else math.floor(spec.low)
        high = 10 if spec.high is None else math.ceil(spec.high)
        return torch.randint(low, max(high, low + 1), spec.shape, dtype=kind, device=device)
    if spec.low is None and spec.high is None:
        return torch.randn(spec.shape, device=device).to(kind)
    low = -4.0 if spec.low is None else spec.low
    high = low + 4.0 if spec.high is None else spec.high
    return (torch.rand(spec.shape, device=device) * (high - low) + low).to(kind)


# from declarations --------------------------------------------------------------------------------


def by_size(*shape: int) -> str:
    return "x".join(map(spell, shape)) or "0d"


def pointwise(name: str, sizes: Sizes) -> Iterator[Case]:
    """A sample's call on so many elements, and on few."""
    sample = next((s for s in OPS[name].samples if fits(name, s)), None)
    if sample is None:
        return
    for count in (sizes.flat, sizes.short):
        args, kwargs = tree_map(functools.partial(_flat, count), (sample.args, sample.kwargs))
        yield Case(name, "pointwise", by_size(count), call(*args, **kwargs))


def _flat(count: int, leaf: Any) -> Any:
    if not isinstance(leaf, T) or not leaf.shape:
        return leaf
    return T(count, dtype=leaf.dtype, low=leaf.low, high=leaf.high)


def fits(name: str, sample: Call) -> bool:
    """Whether a sample, which may be meant for another overload of the op, is one of this."""
    schema = eager._overloads()[name]._schema.arguments
    positional = [a for a in schema if not a.kwarg_only]
    named = {a.name for a in schema}
    if len(sample.args) > len(positional) or not set(sample.kwargs) <= named:
        return False
    given = dict(zip((a.name for a in positional), sample.args, strict=False)) | sample.kwargs
    if any(not a.has_default_value() and a.name not in given for a in schema):
        return False
    types = {a.name: str(a.type) for a in schema}
    return all(
        isinstance(value, T) == (types[name] in ("Tensor", "Optional[Tensor]"))
        or (value is None and types[name].startswith("Optional"))
        for name, value in given.items()
    )


#: of several largest elements ATen may return any; the draws of float32 hardly ever repeat
DISTINCT = ("argmax", "argmin", "max.dim", "min.dim", "cummax", "cummin")
#: a product of many normal numbers is 0 or infinite; a sum of many is near 0, and all but noise
NEAR_ONE = ("prod", "cumprod")


def reduction(name: str, sizes: Sizes) -> Iterator[Case]:
    """Over rows and over columns, or all of the matrix where the schema names no dim."""
    overload = eager._overloads()[name]
    kind = "scan" if overload.overloadpacket.__name__.removeprefix("log").startswith("cum") else ""
    base = overload.overloadpacket.__name__
    dtype = "float32" if aten_name(overload) in DISTINCT else None
    low, high = (0.99, 1.01) if base in NEAR_ONE else (None, None) if dtype else (0.0, 1.0)
    dim = next((a for a in overload._schema.arguments if a.name == "dim"), None)
    rest = {a.name: 1 for a in overload._schema.arguments if a.name == "correction"}
    for shape in (sizes.matrix, sizes.matrices[-1]):
        x = T(*shape, dtype=dtype, low=low, high=high)
        if dim is None:
            yield Case(name, "reduction", by_size(*shape), call(x))
            continue
        for which, suffix in ((1, ""), (0, "-columns")):
            given = [which] if "List" in str(dim.type) else which
            made = call(x, dim=given, **rest) if dim.kwarg_only else call(x, given, **rest)
            label = by_size(*shape) + suffix
            yield Case(name, kind or "reduction", label, made, across=which == 0)


# all of them --------------------------------------------------------------------------------------


@functools.cache
def cases(small: bool = False) -> dict[str, Case]:
    """By name, in the order of families and of declarations."""
    sizes = SMALL if small else FULL
    found = [case for name in eager._declared() for case in of_overload(name, sizes)]
    found.sort(key=lambda case: FAMILIES.index(case.family))
    return {case.name: case for case in found}


def of_overload(name: str, sizes: Sizes) -> list[Case]:
    """An overload's cases; none of one that nobody has written a call for."""
    from benchmarks.attention_table import attention
    from benchmarks.conv_table import bags, convolutions
    from benchmarks.list_table import lists
    from benchmarks.op_table import written

    tables = written, lists, convolutions, bags, attention
    if found := [case for table in tables for case in table(name, sizes)]:
        return found
    kind = OPS[name].kind if name in OPS else ""
    derive: dict[str, Callable[[str, Sizes], Iterator[Case]]] = {
        "pointwise": pointwise,
        "reduction": reduction,
    }
    return list(derive[kind](name, sizes)) if kind in derive else []


def chosen(wanted: str, small: bool) -> list[Case]:
    """The cases of a comma list of families, cases, or names as ``enable(only=...)`` takes them.

    Raises: UnknownOp for a name that is none of these, with the nearest ones
    """
    every, found = cases(small), {}
    for word in filter(None, (part.strip() for part in wanted.split(","))):
        if word in FAMILIES:
            hits = [case for case in every.values() if case.family == word]
        elif word in every:
            hits = [every[word]]
        else:
            named = eager._names(frozenset([word]), "--ops")
            hits = [case for case in every.values() if case.overload in named]
        found.update({case.name: case for case in hits})
    return list(found.values()) if wanted else list(every.values())


def without_cases() -> list[str]:
    """Overloads that are not timed."""
    timed = {case.overload for case in cases().values()}
    return [name for name in eager._declared() if name not in timed]
