"""One call of an overload as a compiled function: the compiler with a graph of one node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..config import Config, cache_dir
from ..kernels.op import OPS
from ..kernels.target import Target
from ..lowering import native
from ..lowering.foreach import single_op
from ..lowering.overload import name_of
from ..lowering.private import enter_fake_mode_once
from . import attention
from .attention import ATTENTION
from .bags import BAGS, KEPT
from .composed import composed_graph, told
from .convolutions import PRODUCTS, convolution_graph, is_convolution
from .counting import SIZED
from .forms import Form
from .lists import RULES as LISTS
from .long_scans import LONG_SCANS
from .one_node import OneCall, one_node_graph
from .operands import layout_of
from .rules import ON_HOST
from .sized import Steps, program
from .varying import Sizes, Variant, why_idle

SEED = "gems.seed.default"


def aten_name(overload: torch._ops.OpOverload) -> str:
    """As ATen spells it: ``gelu``, ``add.Tensor``."""
    return overload.name().removeprefix("aten::")


class _Inside(threading.local):
    off = False  # whether this thread is inside our own code, whose calls are ATen's


inside = _Inside()


def takes_any_sizes(overload: torch._ops.OpOverload, form: Form | None) -> bool:
    """Whether calls of it may be compiled for sizes that differ: not where host or rule look at
    sizes to choose, nor lists, which are a model's parameters."""
    functional = overload if form is None else form.functional
    return not (
        overload in SIZED
        or overload in ATTENTION
        or functional in LISTS
        or functional._schema.is_mutable
        or is_convolution(functional)
        or single_op(functional) is not None
    )


def compile_one(
    overload: torch._ops.OpOverload,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    target: Target,
    config: Config,
    form: Form | None = None,
    sizes: Sizes | None = None,
) -> Variant:
    """The call as a graph of one node, through the compiler; or of what torch takes it apart into,
    if that node is no declared op. ``form``: what the overload is, if it writes. ``sizes``: those
    that it is compiled for, if not its own; see ``takes_any_sizes``."""
    if overload in ATTENTION and (why := attention.why_native(overload, args, kwargs, target)):
        return Variant(None, False, why)
    if (rule := SIZED.get(overload) or ATTENTION.get(overload)) is not None:
        compiled = lambda make: _compiled(make(), overload, target, config)  # noqa: E731
        steps = Steps(lambda make: in_clean_thread(lambda: compiled(make)))
        run = program(rule, args, kwargs, steps)
        return Variant(run, len(overload._schema.returns) == 1, layouts=None)
    functional = overload if form is None else form.functional
    if is_convolution(functional):
        made = convolution_graph(functional, args, kwargs, target)
        return _compiled(made, overload, target, config, PRODUCTS)
    variant = Variant(None, False)
    whole = str(functional) in OPS or single_op(functional) is not None
    makes: list[Callable[..., OneCall]] = [one_node_graph]
    if not whole:
        makes.append(composed_graph)
    if functional in LONG_SCANS or functional in LISTS:
        makes = [composed_graph, one_node_graph]
    if functional in BAGS:
        makes = [partial(composed_graph, keep=KEPT), composed_graph]
    if functional._schema.is_mutable and form is not None:
        makes = [composed_graph]
    for make in makes:
        variant = _compiled(make(overload, args, kwargs, form, sizes), overload, target, config)
        if variant.run is not None:
            break
    if sizes is not None:
        variant.layouts = None
    if variant.run is not None and overload in ON_HOST:
        variant.run = told(variant.run)
    return variant


def _compiled(
    made: OneCall,
    overload: torch._ops.OpOverload,
    target: Target,
    config: Config,
    also: Collection[str] = (),
) -> Variant:
    """``also``: overloads of which calls may be ATen's."""
    from ..backend import lowering_options
    from ..lowering.graph import is_view
    from ..lowering.pipeline import compile_graph
    from ..lowering.symbols import hints_of
    from ..lowering.translate import makes_nothing

    if isinstance(made, str):
        return Variant(None, False, made)
    gm, inputs, single = made
    if target.backend == "cuda":
        native.start(cache_dir()).wait()  # a second once a machine; calls are launched by it
    # A pool of workers would take longer to start than one kernel to compile.
    options = replace(lowering_options(config, target), alone=True, threads=0)
    run, report = compile_graph(gm, inputs, options, f"eager_{aten_name(overload)}")
    known = hints_of(gm.graph)
    if known and (why_not := why_idle(report.plan, target.multiprocessors, known)):
        return Variant(None, single, why_not)
    # what is absent, a saved buffer that a GPU needs not, a view of the result, a seed that the
    # host does not draw
    full = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    called = {*full, *(report.plan.aten if report.plan is not None else ())}
    may = {SEED, *also}
    free = [n for n in called if makes_nothing(n) or is_view(n) or name_of(n.target) in may]
    if report.launches and report.aten_calls == len(free):
        (output,) = gm.graph.find_nodes(op="output")
        layouts = [layout_of(n and n.meta["val"]) for n in output.args[0]]
        return Variant(run, single, "", layouts)
    why = [*report.failures, *report.aten]
    return Variant(None, single, "; ".join(why) or "it computes nothing")


def in_clean_thread(make: Callable[[], Variant]) -> Variant:
    """Run in a thread of its own: no dispatch mode, autocast, vmap or tracing of the caller's."""
    enter_fake_mode_once()
    found: list[Variant] = []
    failed: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def body() -> None:
        inside.off = True
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.no_grad():
                found.append(make())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, name="gems-eager-compile", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
