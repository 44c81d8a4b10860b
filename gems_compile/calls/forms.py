"""In-place and out= overloads, derived from the functional overload of the same op.

``add_.Tensor`` and ``add.out`` are ``add.Tensor`` with a place for its result: nothing of them is
declared. The kernel that computes the result stores it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.draws import DRAWS
from ..kernels.factories import FACTORIES, OPTIONS
from .counting import SIZED

IN_PLACE, OUT = "in-place", "out="
TENSORS = "List[Tensor]"  # a type, as a schema prints it
#: forms of which the compiler takes no call
UNSERVED = {
    # they only copy
    "aten.clone.out",
    "aten.lift_fresh_copy.out",
    "aten.squeeze_copy.out",
    "aten.view_copy.out",
    # what is not yet added up, or multiplied, would be written over
    "aten.cumsum_.default",
    "aten.cumprod_.default",
    # their kernels are written as a whole, and store in memory of their own
    "aten.convolution.out",
    "aten.convolution_backward.out",
    "aten._conv_depthwise2d.out",
    "aten._embedding_bag.out",
    "aten._embedding_bag_forward_only.out",
    # a scatter writes a copy of its own
    "aten._embedding_bag_dense_backward.out",
    "aten.embedding_dense_backward.out",
    "aten.index_add.out",
    "aten.index_copy.out",
    "aten.index_fill.int_Scalar_out",
    "aten.index_fill.int_Tensor_out",
    "aten.scatter_reduce_.two",
    "aten.scatter_reduce.two_out",
    "aten.unfold_backward.out",
    # a place for complex numbers
    "aten.polar.out",
    # ATen takes them apart into the functional op, which is served, and a copy
    "aten.rand.generator_out",
    "aten.randn.out",
    "aten.randn.generator_out",
    # its saved statistics are empty
    "aten._native_batch_norm_legit_no_training.out",
}


@dataclass(frozen=True)
class Form:
    """An overload that writes what ``functional`` returns; ``written`` names where. One that has no
    functional overload stands there itself, and its rule writes its operands. ``once``: a tensor
    that a call has twice is one to whoever describes and runs it."""

    overload: torch._ops.OpOverload
    functional: torch._ops.OpOverload
    kind: str
    written: tuple[str, ...]
    once: bool = False


def forms_of(functional: torch._ops.OpOverload) -> Iterator[Form]:
    """The overloads that torch has of this op, with the same arguments, that write the result.
    Those of a factory take no options. A place for a result whose size is data is ATen's. Results
    in a list have in-place forms alone."""
    schema = functional._schema
    if schema.is_mutable or functional in SIZED:
        return
    if torch.Tag.nondeterministic_seeded in functional.tags and str(functional) not in DRAWS:
        return
    returned = [str(r.type) for r in schema.returns]
    of_lists = returned == [TENSORS]
    if not of_lists and set(returned) != {"Tensor"}:
        return
    base = functional.overloadpacket.__name__.removesuffix("_functional")
    options = OPTIONS if str(functional) in {*FACTORIES, *DRAWS} else ()
    wanted = [_signature(a) for a in schema.arguments if a.name not in options]
    if len(returned) == 1 and wanted and wanted[0][1] == returned[0]:
        for overload in _overloads(f"{base}_"):
            if [_signature(a) for a in overload._schema.arguments] == wanted:
                yield Form(overload, functional, IN_PLACE, (overload._schema.arguments[0].name,))
    for overload in () if of_lists else _overloads(base):
        out = tuple(a.name for a in overload._schema.arguments if a.is_out)
        rest = [_signature(a) for a in overload._schema.arguments if not a.is_out]
        if len(out) == len(schema.returns) and rest == wanted:
            yield Form(overload, functional, OUT, out)


def _overloads(base: str) -> list[torch._ops.OpOverload]:
    packet = getattr(torch.ops.aten, base, None)
    found = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    return [overload for overload in found if str(overload) not in UNSERVED]


def _signature(argument: Any) -> tuple[str, str]:
    return argument.name, str(argument.type)


def places(form: Form, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that a call writes, which are also what it returns; or their nodes."""
    if form.kind == OUT:
        return [kwargs[name] for name in form.written]
    found: list[Any] = []
    for place in args[: len(form.written)]:
        found += place if isinstance(place, (list, tuple)) else [place]
    return found


def share_memory(written: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether what a call writes may lie in the same memory as another one of its ``tensors``, as
    far as ATen looks as well. An empty tensor lies nowhere."""
    if len(tensors) == 1:
        return False
    places = {t.untyped_storage().data_ptr() for t in written if t.numel()}
    found = [t.untyped_storage().data_ptr() in places for t in tensors if t.numel()]
    return sum(found) > len(places)


def why_not_written(written: Tensor, result: Tensor, same_dtype: bool) -> str | None:
    """Why a result cannot be stored in a place as ATen would store it, or None."""
    if written.shape != result.shape:
        return f"its result is {list(result.shape)}, the place {list(written.shape)}"
    if same_dtype and written.dtype != result.dtype:
        return f"its result is {result.dtype}, the place {written.dtype}"
    if not torch.can_cast(result.dtype, written.dtype):
        return f"{result.dtype} does not become {written.dtype}"
    if any(s == 0 and n > 1 for s, n in zip(written.stride(), written.shape, strict=True)):
        return "it writes memory that several elements share"
    return None


def functional_call(
    form: Form, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of ``functional`` that are those of a call of the form, of tensors or of nodes.
    A factory makes what the place is."""
    given = {name: value for name, value in kwargs.items() if name not in form.written}
    own = {a.name: a for a in form.overload._schema.arguments}
    place = kwargs[form.written[0]] if form.kind == OUT else args[0]
    place = place.meta["val"] if isinstance(place, torch.fx.Node) else place
    for argument in form.functional._schema.arguments[len(args) :]:
        name = argument.name
        if name not in own and name in ("dtype", "device"):
            given[name] = getattr(place, name)
        elif name not in given and not argument.has_default_value() and name in own:
            given[name] = own[name].default_value  # ``bernoulli_()`` has one for p
    return args, given


def add_writes(
    form: Form,
    graph: torch.fx.Graph,
    results: Sequence[torch.fx.Node | None],
    places: Sequence[torch.fx.Node],
    pointwise: bool,
) -> str | None:
    """Store results in the places, which are placeholders; why that cannot be, or None."""
    for result, place in zip(results, places, strict=True):
        if result is None:
            return "a result is absent"
        # A reduction into another dtype is computed in that one by ATen.
        same_dtype = form.kind == OUT or not pointwise
        if why := why_not_written(place.meta["val"], result.meta["val"], same_dtype):
            return why
        if not place.meta["val"].numel():
            continue
        copy = graph.call_function(torch.ops.aten.copy_.default, (place, result))
        copy.meta["val"] = place.meta["val"]
    return None
