"""``backend="gems"``: a Dynamo graph -> AOTAutograd -> ``lowering.pipeline``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from . import registered
from .collection import WhileDynamoTraces, no_collection
from .config import Config, cache_bytes, cache_dir, told, vendor
from .dynamo import Breaks, Recompile, recompile, tell
from .insight import logs
from .insight.rewritten import written_out
from .kernels.target import current_target
from .late import Boxed, Late
from .lowering.channels_last import Decision
from .lowering.constants import Unsaveable
from .lowering.decompose import Decompositions
from .lowering.options import Options
from .lowering.partition import partition
from .lowering.passes import draws_random_numbers
from .lowering.pipeline import Compilation
from .lowering.private import backward_at_once, donate_nothing, looks_at_memory, traces
from .lowering.report import Report
from .lowering.rewrite import Write, unwritten
from .lowering.saved import Saved, as_text
from .lowering.whole_graphs import NOT_KEPT, Kept, Lookup
from .second_order import Program, with_second_order
from .warm import Graph, tag, why_off

if TYPE_CHECKING:
    from .insight.dump_files import Session

log = logging.getLogger(__name__)

_told: set[str] = set()
_breaks = Breaks()
_traces = WhileDynamoTraces()
_traces.listen()  # who imports the backend is about to compile


def reports() -> list[Report]:
    """What became of every graph compiled in this process, oldest first."""
    return list(gems.reports)


class Gems:
    """The backend object: ``torch.compile(model, backend=gems)``, or ``backend="gems"``.

    ``reports`` tells what became of each graph compiled through this object, oldest first, and
    ``recompiles`` which of them came of a function that had been compiled before, and why. Where
    it is ``fresh`` none comes from the cache of whole graphs, whose reports tell less.
    """

    compiler_name = "gems"
    __name__ = "gems"

    def __init__(self, fresh: bool = False) -> None:
        self.fresh = fresh
        self.reports: list[Report] = []
        self.recompiles: list[Recompile] = []
        self.watchers: list[Callable[[], None]] = []  # called when a graph comes, and at a reset
        self.late: weakref.WeakSet[Late] = weakref.WeakSet()  # compiled, as long as they are used
        self.graphs = count()

    def __call__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        _traces.came_to_us()
        config = Config.from_call(mode, options)
        target = current_target(vendor())
        if target is None:
            _tell_once("no GPU and no interpreter (TRITON_INTERPRET=1): graphs run as ATen")
            return aot_autograd(fw_compiler=run_as_aten, keep_inference_input_mutations=True)(
                gm, inputs
            )
        for watcher in self.watchers:
            watcher()
        with no_collection():
            session = _dump_session(config, mode, options)
            return _Front(gm, inputs, config, target, self, session).compiled(gm, inputs)

    def wait(self) -> None:
        """Wait for the kernels of all that was compiled so far, before anything runs."""
        for compiled in list(self.late):
            compiled.wait()

    def reset(self) -> None:
        """``torch._dynamo.reset()`` calls this."""
        for watcher in self.watchers:
            watcher()
        self.reports.clear()
        self.recompiles.clear()
        self.late.clear()
        self.graphs = count()

    def __repr__(self) -> str:
        return "<backend gems>"


gems = Gems()


class _Front:
    """One of Dynamo's graphs on its way: a forward and its backward, or an inference graph."""

    def __init__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        config: Config,
        target: Any,
        owner: Gems,
        session: Session | None,
    ) -> None:
        self.config, self.owner = config, owner
        self.options = lowering_options(config, target)
        if target.name != "interpreter":
            from .lowering import native
            from .lowering.load import pool

            pool(self.options.threads)  # workers start while AOTAutograd traces
            if target.backend == "cuda":
                native.start(self.options.cache_dir)
        self.session = session
        self.verify = _verifier(config)
        self.program = Program(gm) if _may_train(inputs) else None
        write = written_out if self._is_watched() else unwritten
        self.rewrites = _rewrite(gm, session, config.rewrites, write) if config.rewrites else None
        if session is not None:
            session.clock.rewritten()
        self.number = next(owner.graphs)
        again = recompile(self.number)
        owner.recompiles += [] if again is None else [again]
        breaks = _breaks.look()
        tell(breaks)
        if session is not None:
            session.around(again, breaks)
        self.off = why_off(config)  # of the cache of whole graphs
        self.told = False
        self.layouts: list[Decision] = []
        self.reports: list[Report] = []
        self.revived: list[Saved] = []  # from the cache

    def _is_watched(self) -> bool:
        """Whether ``explain``, a dump or TORCH_TRACE asks which nodes a rewrite took; texts of them
        cost time, and nobody else reads them."""
        return self.session is not None or self.owner.fresh or traces()

    def compiled(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What runs in place of Dynamo's graph."""
        compiled = (self._through_cache if self.off is None else self._unkept)(gm, inputs)
        self.told = True
        for report in self.reports:
            logs.tell(report)
        return compiled if self.program is None else with_second_order(compiled, self.program)

    def _through_cache(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Through the cache of whole graphs; compiled without it where that fails."""
        key = tag(self.config, self.options, inputs, self.rewrites)
        lookup = Lookup(Graph, key, self._revive, self.owner.fresh)
        try:
            with lookup.active():
                compiled = self._through_aot(gm, inputs, lookup.compiler)
            failed: Exception | None = self._failure()
        except (AttributeError, TypeError, AssertionError) as e:  # a torch that we do not know
            failed = e
        if failed is not None:
            self._forget()
            compiled = self._unkept(gm, inputs)  # what is wrong here, too, raises
            lookup.said = f"{NOT_KEPT}{type(failed).__name__}: {failed}"
            log.warning("the cache of whole graphs is not used: %s", failed)
        self._say(lookup.said)
        return compiled

    def _unkept(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Without the cache of whole graphs. Where one of torch's rules that take ops apart fails,
        as those for Inductor may without the rest of it, the ops stay whole and are ATen's."""
        try:
            return self._through_aot(gm, inputs, _plain)
        except (AttributeError, ImportError, NameError) as e:
            if self.config.strict:
                raise
            log.warning("graph %d is not taken apart: %s: %s", self.number, type(e).__name__, e)
            self._forget()
            return self._through_aot(gm, inputs, _plain, {})

    def _failure(self) -> Exception | None:
        """Why a graph from the cache cannot run: a kernel that was missing does not compile."""
        return next(filter(None, (saved.failure() for saved in self.revived)), None)

    def _forget(self) -> None:
        """Begin anew."""
        mine = set(map(id, self.reports))
        self.owner.reports[:] = [r for r in self.owner.reports if id(r) not in mine]
        self.reports.clear()
        self.revived.clear()

    def _say(self, cache: str) -> None:
        for report in self.reports:
            report.cache = cache

    def _through_aot(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        compiler: Callable[[Any], Any],
        rules: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> Callable[..., Any]:
        """AOTAutograd's function; ``compiler`` makes of ours what it takes. ``rules`` take ops
        apart, instead of ours."""
        rules = Decompositions(self.options.own_rng) if rules is None else rules
        with backward_at_once():
            return aot_autograd(
                fw_compiler=compiler(partial(self._compile, "forward")),
                bw_compiler=compiler(partial(self._compile, "backward")),
                inference_compiler=compiler(partial(self._compile, "inference")),
                decompositions=rules,
                partition_fn=partial(partition, options=self.options, decided=self.layouts.append),
                keep_inference_input_mutations=True,
            )(gm, inputs)

    def _report(self, kind: str) -> Report:
        report = Report(f"{self.number}_{kind}")
        report.graph, report.kind, report.rewrites = self.number, kind, self.rewrites
        report.cache = f"off: {self.off}" if self.off is not None else ""
        return report

    def _compile(
        self, kind: str, gm: GraphModule, inputs: Sequence[Any], holder: Any = None
    ) -> tuple[Boxed, Callable[[], str]]:
        """One ATen graph -> (what runs, what writes it for another process). ``holder``: see
        ``Late.boxed``."""
        if self.revived:  # a backward from the cache was of no use
            self._forget()
        report = self._report(kind)
        if kind == "forward":
            donate_nothing()
        elif kind == "backward":
            captures = [r.captures for r in self.reports if r.kind == "forward"]
            report.outside = [name for c in captures if c is not None for name in c.outside]
        if self.program is not None and kind == "forward":
            self.program.random = any(map(draws_random_numbers, gm.graph.nodes))
        if self.layouts and kind != "inference":
            report.layout = self.layouts[-1]
        with no_collection():  # a backward may be compiled when it first runs
            run, write = _compile_one(
                gm, inputs, self.options, report, self.session, self.owner.late, holder, self.verify
            )
        self._add(report)
        if self.told:  # a backward, when it first ran
            logs.tell(report)
        random = self.program is not None and self.program.random
        return run, partial(write, kind=kind, random=random)

    def _add(self, report: Report) -> None:
        self.reports.append(report)
        self.owner.reports.append(report)

    def _revive(self, graph: Kept) -> Boxed:
        """A graph that the cache had, as ``_compile`` would have made it."""
        report = self._report("")
        saved = Saved(graph.text, self.options, report, graph.carried)
        report.kind = saved.more["kind"]
        report.label += report.kind
        if self.program is not None:
            self.program.random |= saved.more["random"]

        late = Late(saved.load)
        self.owner.late.add(late)
        self.revived.append(saved)
        self._add(report)
        return late.boxed(graph)


def _plain(compile_one: Callable[..., tuple[Boxed, Any]]) -> Callable[..., Boxed]:
    """As AOTAutograd takes it where nothing is kept."""
    return lambda gm, inputs: compile_one(gm, inputs)[0]


def _may_train(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    )


def _dump_session(
    config: Config, mode: str | None, options: dict[str, Any] | None
) -> Session | None:
    if config.dump is None:
        return None
    from .insight.dump_files import Session

    return Session(config.dump, told(config, mode, options))


def _verifier(config: Config) -> Callable[..., Any] | None:
    """What compares the kernels of a graph with eager; None where nobody asked for it."""
    if not config.verify:
        return None
    if looks_at_memory() is None:
        _tell_once("verify compares nothing: this torch has no way to look at a kernel's memory")
        return None
    from .insight.verify import Verifier

    if config.cudagraphs:
        _tell_once("verify sees every launch: nothing is captured in CUDA graphs")
    return Verifier


def _rewrite(gm: GraphModule, session: Session | None, which: bool | str, write: Write) -> Any:
    """Rewrite Dynamo's graph in place; the RewriteLog."""
    from .lowering.grouped import share_keys
    from .lowering.masks import lay_out_masks, read_constant_masks
    from .lowering.rewrite import RewriteLog, rewrite_dynamo_graph
    from .lowering.rewrites import MEMORY, TABLE

    if which == "memory":
        from .kernels.served import serve_with
        from .own_ops import serve

        serve_with(serve)  # linear_cross_entropy stays a call, within which our kernels run
    if session is not None:
        session.dynamo(gm, "dynamo.txt")
    rewrites = RewriteLog()
    if rules := registered.active(memory=which == "memory"):
        from .lowering.user_rewrites import rewrite_for_users  # 7 ms that nobody else waits for

        rewrites = rewrite_for_users(gm, rules, write)
    rewrites.extend(rewrite_dynamo_graph(gm, MEMORY if which == "memory" else TABLE, write=write))
    rewrites.extend(read_constant_masks(gm, write))
    lay_out_masks(gm)
    rewrites.extend(share_keys(gm, write))
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
        cudagraphs=config.cudagraphs and not config.verify,
        cache_dir=cache_dir(),
        cache_bytes=cache_bytes(),
        threads=config.threads,
        tune=config.tune,
        tune_seconds=config.tune_seconds,
    )


def _compile_one(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    report: Report,
    session: Session | None,
    late: weakref.WeakSet[Late],
    holder: Any,
    verify: Callable[..., Any] | None = None,
) -> tuple[Boxed, Callable[..., str]]:
    """One ATen graph -> (boxed callable, what writes it for another process).

    Its kernels are waited for when it is first called: those of a forward compile while AOTAutograd
    and we go on to its backward.
    """
    dump = session.start(report.kind) if session is not None else None
    observe = {"observe": dump.observe} if dump is not None else {}

    def otherwise(e: Exception) -> Boxed:
        if options.strict:
            raise e
        log.warning("graph %s runs as ATen: %s: %s", report.label, type(e).__name__, e)
        report.failures.append(f"{type(e).__name__}: {e}")
        return run_as_aten(gm, inputs)

    try:
        begun = Compilation(gm, options, report, **observe)
        if verify is not None:
            begun.watch = partial(verify, folder=None if dump is None else dump.path)
        if dump is None:
            waiting = Late(partial(logs.loaded, begun.load, report), otherwise)
            late.add(waiting)
            return waiting.boxed(holder), partial(as_text, begun)
        run = begun.load()
    except Exception as e:
        if dump is not None:
            dump.failed(e)
        run = otherwise(e)
    if dump is not None:
        dump.finish(report)
    return run, partial(_not_written, report)


def _not_written(report: Report, **more: Any) -> str:
    raise Unsaveable("; ".join(report.failures) or "it was dumped")


def run_as_aten(gm: GraphModule, inputs: Sequence[Any]) -> Boxed:
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
