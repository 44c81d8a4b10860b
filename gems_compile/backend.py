"""``backend="gems"``: a Dynamo graph -> AOTAutograd -> ``lowering.pipeline``."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from .config import Config, cache_dir, vendor
from .kernels import load_ops
from .kernels.target import current_target
from .lowering.channels_last import Decision
from .lowering.decompose import decompositions
from .lowering.options import Options
from .lowering.partition import partition
from .lowering.passes import draws_random_numbers
from .lowering.pipeline import Compilation, Report
from .lowering.private import backward_at_once, donate_nothing
from .second_order import Program, with_second_order

if TYPE_CHECKING:
    from .dump import Session

log = logging.getLogger(__name__)

#: more objects than Python 3.12 freezes as it starts (375), fewer than any program that calls
#: ``gc.freeze`` has
FROZEN_BY_PYTHON = 1000

_told: set[str] = set()


def reports() -> list[Report]:
    """What became of every graph compiled in this process, oldest first."""
    return list(gems.reports)


class Gems:
    """The backend object: ``torch.compile(model, backend=gems)``, or ``backend="gems"``.

    ``reports`` tells what became of each graph compiled through this object, oldest first.
    """

    compiler_name = "gems"
    __name__ = "gems"

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.late: weakref.WeakSet[_Late] = weakref.WeakSet()  # compiled, as long as they are used
        self.graphs = count()

    def __call__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        config = Config.from_call(mode, options)
        target = current_target(vendor())
        if target is None:
            _tell_once("no GPU and no interpreter (TRITON_INTERPRET=1): graphs run as ATen")
            return aot_autograd(fw_compiler=run_as_aten, keep_inference_input_mutations=True)(
                gm, inputs
            )
        load_ops()
        with _no_collection():
            return _compile(gm, inputs, config, target, self)

    def wait(self) -> None:
        """Wait for the kernels of all that was compiled so far, before anything runs."""
        for compiled in list(self.late):
            compiled.wait()

    def reset(self) -> None:
        """``torch._dynamo.reset()`` calls this."""
        self.reports.clear()
        self.late.clear()
        self.graphs = count()

    def __repr__(self) -> str:
        return "<backend gems>"


gems = Gems()


def _compile(
    gm: GraphModule, inputs: Sequence[Any], config: Config, target: Any, owner: Gems
) -> Any:
    options = lowering_options(config, target)
    if target.name != "interpreter":
        from .lowering import native
        from .lowering.load import pool

        pool(options.threads)  # workers start while AOTAutograd traces
        if target.backend == "cuda":
            native.start(options.cache_dir)
    session = _dump_session(config)
    program = Program(gm) if _may_train(inputs) else None
    rewrites = _rewrite(gm, session) if config.rewrites else None
    number = next(owner.graphs)
    layouts: list[Decision] = []

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_one(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            report = Report(f"{len(owner.reports)}_{kind}")
            if kind == "forward":
                donate_nothing()
            if program is not None and kind == "forward":
                program.random = any(map(draws_random_numbers, gm.graph.nodes))
            report.graph, report.kind, report.rewrites = number, kind, rewrites
            if layouts and kind != "inference":
                report.layout = layouts[-1]
            with _no_collection():  # a backward may be compiled when it first runs
                run = _compile_one(gm, inputs, options, report, session, owner.late)
            owner.reports.append(report)
            return run

        return compile_one

    with backward_at_once():
        compiled = aot_autograd(
            fw_compiler=compiler("forward"),
            bw_compiler=compiler("backward"),
            inference_compiler=compiler("inference"),
            decompositions=partial(decompositions, options.own_rng),
            partition_fn=partial(partition, options=options, decided=layouts.append),
            keep_inference_input_mutations=True,
        )(gm, inputs)
    return compiled if program is None else with_second_order(compiled, program)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No cyclic garbage collection meanwhile: tracing allocates much that lives on, and looking
    through it again and again took a fifth of the compile time of a 64-layer model."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _call_it_old()
        gc.enable()


def _call_it_old() -> None:
    """Count what was allocated meanwhile among the old objects, which the next full collection
    looks through. As young ones they would all be looked through at the next allocation: 0.15 s
    after a ResNet-50, 0.5 s after 16 layers of Llama."""
    if gc.get_freeze_count() < FROZEN_BY_PYTHON:  # or thawing would take in what a user froze
        gc.freeze()
        gc.unfreeze()


def _may_train(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    )


def _dump_session(config: Config) -> Session | None:
    if config.dump is None:
        return None
    from .dump import Session

    return Session(config.dump)


def _rewrite(gm: GraphModule, session: Session | None) -> Any:
    """Rewrite Dynamo's graph in place; the RewriteLog."""
    from .lowering.masks import lay_out_masks, read_constant_masks
    from .lowering.rewrite import rewrite_dynamo_graph

    if session is not None:
        session.dynamo(gm, "dynamo.txt")
    rewrites = rewrite_dynamo_graph(gm)
    rewrites.extend(read_constant_masks(gm))
    lay_out_masks(gm)
    if session is not None and rewrites.fired:
        session.dynamo(gm, "dynamo_rewritten.txt")
    return rewrites


def lowering_options(config: Config, target: Any) -> Options:
    return Options(
        target=target,
        exact=config.numerics == "eager",
        strict=config.strict,
        own_rng=config.rng == "gems",
        layout=config.layout,
        keep_weights=config.keep_weights,
        cache_dir=cache_dir(),
        threads=config.threads,
    )


def _compile_one(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    report: Report,
    session: Session | None,
    late: weakref.WeakSet[_Late],
) -> Callable[[list[Any]], Any]:
    """One ATen graph -> boxed callable.

    Its kernels are waited for when it is first called: those of a forward compile while AOTAutograd
    and we go on to its backward.
    """
    dump = session.start(report.kind) if session is not None else None
    observe = {"observe": dump.observe} if dump is not None else {}

    def otherwise(e: Exception) -> Callable[[list[Any]], Any]:
        if options.strict:
            raise e
        log.warning("graph %s runs as ATen: %s: %s", report.label, type(e).__name__, e)
        report.failures.append(f"{type(e).__name__}: {e}")
        return run_as_aten(gm, inputs)

    try:
        begun = Compilation(gm, options, report, **observe)
        if dump is None:
            waiting = _Late(begun.load, otherwise)
            late.add(waiting)
            return waiting.boxed()
        run = begun.load()
    except Exception as e:
        if dump is not None:
            dump.failed(e)
        run = otherwise(e)
    if dump is not None:
        dump.finish(report)
    return run


class _Late:
    """A graph whose kernels are waited for when it is first called."""

    def __init__(
        self,
        load: Callable[[], Callable[[list[Any]], Any]],
        otherwise: Callable[[Exception], Callable[[list[Any]], Any]],
    ) -> None:
        self.load, self.otherwise, self.lock = load, otherwise, threading.Lock()
        self.loaded: Callable[[list[Any]], Any] | None = None

    def boxed(self) -> Callable[[list[Any]], Any]:
        def run(args: list[Any]) -> Any:
            return (self.loaded or self.wait())(args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def wait(self) -> Callable[[list[Any]], Any]:
        with self.lock:
            if self.loaded is None:
                with _no_collection():
                    try:
                        self.loaded = self.load()
                    except Exception as e:
                        self.loaded = self.otherwise(e)
                del self.load, self.otherwise  # and with them the graph
            return self.loaded


def run_as_aten(gm: GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """The graph, node by node, through ATen; boxed as AOTAutograd asks for."""
    interpreter = torch.fx.Interpreter(gm)

    def run(args: list[Any]) -> Any:
        return interpreter.boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
