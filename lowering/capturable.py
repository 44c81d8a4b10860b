"""Which steps of a plan a CUDA graph can hold, and the plan in stretches of those and of others.

A graph is a fixed list of launches: what waits for the device, works on the CPU, or has a size
that only its data tells, runs between two graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .graph import is_tensor, mutated_arguments, nodes_in, source_line, value_of
from .group import Group
from .indexing import is_static, product, size_of
from .ir import Value, base_of
from .packed import is_unpacked
from .source import Source

#: ops that wait for the device, though their schemas do not say so
WAITING = (
    "_local_scalar_dense",
    "_assert_scalar",
    "_linalg_check_errors",
    "_fused_moving_avg_obs_fq_helper",
    "_fused_moving_avg_obs_fq_helper_functional",
    "dense_to_jagged",
    "jagged_to_padded_dense",
)
#: families of ops whose libraries wait for the device
LIBRARIES = ("linalg_", "_linalg_", "cholesky", "lu_", "geqrf", "ormqr", "orgqr", "triangular_")
#: they give a tensor other memory
MOVING = ("set_", "resize_")
#: they look for the places where a mask is set
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")
#: a kernel of the user's own
USER_KERNELS = ("triton_kernel_wrapper_mutation", "triton_kernel_wrapper_functional")

#: host time of a launch, of an ATen call, and of a replay with what surrounds it, in us: H200
LAUNCH, CALL, REPLAY = 2.0, 6.0, 12.0
#: bytes that copying an input or a result moves in a us, there and back
BYTES = 1.7e6


@dataclass
class Stretch:
    """Consecutive steps. ``reasons``: why it is no graph, with the lines of the user's code."""

    captured: bool
    steps: list[Any]
    reasons: list[str] = field(default_factory=list)


def stretches(steps: Sequence[Any], why_not: Callable[[Any], str | None]) -> list[Stretch]:
    """The steps, as ``in_order`` has them, parted where ``why_not`` has a reason."""
    found: list[Stretch] = []
    for step in steps:
        if is_free(step) and found:
            found[-1].steps.append(step)
            continue
        why = why_not(step)
        if not found or found[-1].captured != (why is None):
            found.append(Stretch(why is None, []))
        found[-1].steps.append(step)
        if why is not None:
            found[-1].reasons.append(_told(step, why))
    return found


def too_short(stretch: Stretch, copied: int) -> str | None:
    """Why replaying a stretch would not be faster than launching it; ``copied``: bytes of its
    inputs and of the results that are the caller's."""
    kernels = sum(isinstance(s, Group) for s in stretch.steps)
    calls = sum(isinstance(s, Node) and not is_free(s) for s in stretch.steps)
    if LAUNCH * kernels + CALL * calls >= REPLAY + copied / BYTES:
        return None
    what = f"{kernels} kernels and {calls} ATen calls"
    if copied > 2**20:
        return f"{what}: a replay would copy {copied / 2**20:.0f} MB in and out"
    return f"{what}: a replay takes as long"


def merged(parts: Iterable[Stretch]) -> list[Stretch]:
    """Neighbours of one kind as one stretch."""
    found: list[Stretch] = []
    for part in parts:
        if found and not found[-1].captured and not part.captured:
            found[-1].steps += part.steps
            found[-1].reasons += part.reasons
        else:
            found.append(part)
    return found


def crossing(parts: Sequence[Stretch], sources: dict[Group, Source]) -> set[Value]:
    """What kernels of one stretch write, and those of another read."""
    home = {out: k for k, part in enumerate(parts) for g in _groups(part) for out in g.outputs}
    return {
        what
        for k, part in enumerate(parts)
        for g in _groups(part)
        for _, role, what in sources[g].params
        if role == "in" and home.get(what, k) != k
    }


def _groups(part: Stretch) -> Iterator[Group]:
    return (s for s in part.steps if isinstance(s, Group))


def in_order(steps: Sequence[Any]) -> list[Any]:
    """The steps, with each part of a tuple right behind the call that makes the tuple: they are of
    one stretch."""
    parts: dict[Node, list[Node]] = {}
    for step in steps:
        if _is_part(step):
            parts.setdefault(step.args[0], []).append(step)
    found: list[Any] = []
    known = set(steps)
    pending = [s for s in steps if not (_is_part(s) and s.args[0] in known)]
    for step in pending:
        found.append(step)
        stack = list(parts.get(step, ())) if isinstance(step, Node) else []
        while stack:  # a part may be a tuple, too
            part = stack.pop(0)
            found.append(part)
            stack = [*parts.get(part, ()), *stack]
    return found


def _is_part(step: Any) -> bool:
    return isinstance(step, Node) and step.target is operator.getitem


def is_free(step: Any) -> bool:
    """Whether a step launches nothing: a constant, a part of a tuple, a size."""
    if not isinstance(step, Node):
        return False
    return step.op == "get_attr" or _is_part(step) or _is_number(step) or is_unpacked(step)


def _is_number(node: Node) -> bool:
    """A whole number that is computed from others."""
    return is_size(value_of(node)) and not any(is_tensor(value_of(n)) for n in node.all_input_nodes)


# one step ----------------------------------------------------------------------------------------


def why_not_captured(step: Any, sources: dict[Group, Source], device: torch.device) -> str | None:
    """Why no graph can hold a step; None where one can."""
    if isinstance(step, Group):
        params = sources[step].params
        sizes = [s for _, role, v in params for s in ((v,) if role == "size" else v.shape)]
        return _UNKNOWN_SIZE if any(map(_is_unbacked, sizes)) else None
    if step.op == "get_attr":
        return None
    node = step
    while _is_part(node):
        node = node.args[0]
    if _is_number(node):
        return None
    return _why_not_op(node) or _why_not_values(node, device)


_UNKNOWN_SIZE = "its size is known only when it runs"


def _why_not_op(node: Node) -> str | None:
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        if target.name() in USER_KERNELS:
            return None
        return "it runs Python code of its own"
    if not isinstance(target, torch._ops.OpOverload):
        return "it is a number that the host computes"
    name = target._opname
    aten = target.namespace == "aten"
    waits = name in WAITING or (aten and name.startswith(LIBRARIES))
    if waits or torch.Tag.data_dependent_output in target.tags:
        return "it waits for the device"
    if aten and name in MOVING:
        return "it gives a tensor other memory"
    if getattr(torch.Tag, "cudagraph_unsafe", None) in target.tags:
        return "it is declared unsafe for CUDA graphs"
    if "c10d" in target.namespace:
        return "it communicates with other processes"
    if name in INDEXED and any(
        is_tensor(value_of(n)) and value_of(n).dtype in (torch.bool, torch.uint8)
        for n in nodes_in(node.args[1])
    ):
        return "it waits for the number of places that a mask has"
    if node.kwargs.get("generator") is not None:
        return "it draws from a generator of the program's own"
    return None


def _why_not_values(node: Node, device: torch.device) -> str | None:
    values = [
        *_flat(value_of(node)),
        *(v for n in node.all_input_nodes for v in _flat(value_of(n))),
    ]
    for value in values:
        if is_tensor(value):
            if value.device != device:
                return f"it works on a tensor of the {value.device.type.upper()}"
            if value.layout != torch.strided:
                return "it works on a sparse tensor"
            if any(map(_is_unbacked, value.shape)):
                return _UNKNOWN_SIZE
        elif _is_unbacked(value):
            return "it needs a number that is known only when it runs"
    return None


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [v for part in value for v in _flat(part)]
    return [value]


def is_size(value: Any) -> bool:
    """Whether it is a whole number that is known before the graph runs."""
    return isinstance(value, (torch.SymInt, int)) and not _is_unbacked(value)


def _is_unbacked(size: Any) -> bool:
    """Whether a size, a number or an expression is not known before the graph runs."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        size = size.node.expr
    symbols = getattr(size, "free_symbols", ())
    return any(str(s).startswith(("u", "zuf")) for s in symbols)


def _told(step: Any, why: str) -> str:
    nodes = [step] if isinstance(step, Node) else step.nodes
    if not nodes:
        return why
    node: Any = nodes[0]
    while _is_part(node):
        node = node.args[0]
    line = source_line(node)
    named = isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
    name = str(node.target) if named else getattr(node.target, "__name__", str(node.target))
    return f"{name}: {why}" + (f"    {line}" if line else "")


# memory ------------------------------------------------------------------------------------------


def written(step: Any) -> list[Node]:
    """Nodes in whose memory a step writes, besides its own results."""
    if isinstance(step, Group):
        places = [*step.stores.values(), *(m.params[0] for m in step.members if m.kind == "store")]
        bases = [base_of(place).node for place in places]
        return [node for node in bases if node is not None]
    return list(mutated_arguments(step))


def bytes_of(value: Any) -> int:
    """What a FakeTensor takes; 0 where its sizes are symbols."""
    if not is_tensor(value):
        return 0
    sizes = [size_of(s) for s in value.shape]
    return int(product(sizes)) * value.itemsize if is_static(*sizes) else 0


__all__ = [
    "Stretch",
    "bytes_of",
    "crossing",
    "in_order",
    "is_free",
    "merged",
    "stretches",
    "too_short",
    "why_not_captured",
    "written",
]
