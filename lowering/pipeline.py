"""Compilation: the story of one graph."""

from __future__ import annotations

import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..kernels import load_ops
from ..kernels.fused import register_torch_ops
from ..kernels.op import Authored
from . import passes
from .alike import Alike
from .beside import find_beside, may_stand_beside
from .binding import Watch, bind
from .channels_last import decide
from .code import Code
from .conv_bias import take_biases_apart
from .cuda_graphs import facts_of, why_not
from .cut import Captures, Cut
from .embedding import take_embeddings_apart
from .emit import emit
from .executor import Writer
from .flow import find_escapes, written_by_aten
from .foreach import take_foreach_apart
from .fuse import Fuser
from .graph import kernel_device, output_node
from .group import Group, Plan
from .horizontal import Combined, Part, combine, find_parts, may_share
from .images import take_images
from .indexing import is_static, product
from .ir import SIXTEEN_BIT, Value, base_of
from .joined import join_products
from .kept import keep_weights
from .layout import changes_layout, leaves_gaps_out
from .load import CompileError, Loading
from .options import Options
from .order import needs_of
from .packed import is_unpacked
from .partition import share_seeds
from .pooling import take_poolings
from .products import align_products
from .render import Renderer, kernel_name
from .report import Report
from .row_products import multiply_outer_products, reduce_row_products
from .scan import scans_rows
from .schedule import needs_loop
from .small import Joined, join, joined_source, may_join
from .source import Source
from .stores import store_copies
from .symbols import hints_of
from .tiling import Tiling
from .translate import Program, Translator, op_of
from .tune import Tuner
from .updates import take_updates_apart
from .whole import whole_source

log = logging.getLogger("gems_compile.lowering")

#: first: one random seed a run; last: what products read and write, once nothing else changes
PASSES = (share_seeds, *passes.PASSES, join_products, align_products)
ALONE = tuple(run for run in PASSES if run is not passes.count_in_place)  # that makes it ATen's

#: elements from which on a lone column reduction or GELU is ours
MUCH = 2**21

Observer = Callable[[str, Any], None]


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    label: str = "graph",
    observe: Observer = lambda stage, thing: None,
) -> tuple[Callable[[list[Any]], Any], Report]:
    """An ATen graph -> (boxed callable, report)."""
    begun = Compilation(gm, options, Report(label), observe)
    return begun.load(), begun.report


class Compilation:
    """One graph on its way: planned and written when this is made, while its kernels compile in
    other processes; ``load`` waits for them.

    A group whose kernel cannot be written or compiled becomes ATen's, and the graph is planned
    again.
    """

    def __init__(
        self,
        gm: GraphModule,
        options: Options,
        report: Report,
        observe: Observer = lambda stage, thing: None,
    ) -> None:
        load_ops()
        register_torch_ops()
        self.gm, self.options, self.report, self.observe = gm, options, report, observe
        report.given = len(gm.graph.nodes)
        self.watch: Callable[[Compilation], Watch] | None = None  # who sees every launch
        self.clock = _Clock()
        self.deny: dict[Node, str] = {}  # left to ATen, and why
        self.apart: set[Node] = set()  # of kernels that share no launch
        observe("aten", gm)
        self.device = kernel_device(gm, options.target.device)
        self.facts = facts_of(gm, report.kind, report.outside) if options.cudagraphs else None
        if report.kind == "inference":  # others were one graph when it was decided for them
            report.layout = decide(gm, options)
            biases = take_biases_apart(gm, options)
            if take_images(gm, options.target):
                observe("take_images", gm)
            if take_poolings(gm):
                observe("take_poolings", gm)
            if report.layout.copies or report.layout.weights or biases:
                observe("lay_out_convolutions", gm)
            if options.keep_weights:
                self.deny.update(dict.fromkeys(keep_weights(gm), "kept from call to call"))
        if take_foreach_apart(gm, self.device):
            observe("take_foreach_apart", gm)
        for run in ALONE if options.alone else PASSES:
            run(gm)
            observe(run.__name__, gm)
        for take in (reduce_row_products, multiply_outer_products):
            if take(gm, self.device):
                observe(take.__name__, gm)
        if take_embeddings_apart(gm, self.device):
            observe("take_embeddings_apart", gm)
        if take_updates_apart(gm, self.device, options.target):
            observe("take_updates_apart", gm)
        if options.strict:
            gm.graph.lint()
        report.nodes = sum(n.op == "call_function" and not is_unpacked(n) for n in gm.graph.nodes)
        self.clock.lap(report, "passes")
        self._plan()

    def load(self) -> Callable[[list[Any]], Any]:
        """The boxed callable, once all kernels are compiled."""
        self.clock.start()
        while (launchers := self._launchers()) is None:
            self._plan()
        self.clock.lap(self.report, "triton")
        writer = self.writer
        kernels = {name: launchers[group] for name, group in writer.kernels}
        kernels.update((name, self.loading[group].wide) for name, group in writer.widths.wide)
        watch = None if self.watch is None else self.watch(self)
        code, made = self.code.result(), writer.runs.made
        run = bind(code, self.device, writer.constants, made, kernels, self.report.captures, watch)
        self.clock.lap(self.report, "bind")
        self.observe("done", self.report)
        return run

    def _launchers(self) -> dict[Group, Callable[..., None]] | None:
        """None where a kernel did not compile, whose nodes are now ATen's."""
        found = {}
        for group in self.writer.plan.groups:
            try:
                found[group] = self.loading[group].result()
            except CompileError as e:
                self.loading[group].mark_useless(str(e))
                self._give_up(group, e)
                return None
        return found

    def wide_source(self, group: Group) -> Source:
        """The form of a group's kernel whose places are numbers of 64 bits."""
        widen = self.loading[group].source.widen
        assert widen is not None  # the wrapper names it
        return widen()

    def _plan(self) -> None:
        while (failed := self._attempt()) is not None:
            self._give_up(*failed)

    def _attempt(self) -> tuple[Group, Exception] | None:
        """Plan, write and start to compile; what failed, and why."""
        gm, options, clock, report = self.gm, self.options, self.clock, self.report
        many = options.target.multiprocessors
        program = Translator(self.device, self.deny, many, options.alone).run(gm.graph)
        clock.lap(report, "translate")
        fuser = Fuser(program, gm.graph, many)
        groups = fuser.run()
        store_copies(gm.graph, program, fuser)
        likely = may_share(groups) | may_stand_beside(groups)
        groups = _without_lone(groups, program, fuser, options, likely)
        written = written_by_aten(program, gm.graph)
        clock.lap(report, "fuse")
        sources: dict[Group, Source] = {}
        self.loading: dict[Group, Loading] = {}
        self.loads: dict[str, Loading] = {}  # the same, by what is loaded
        small = may_join(groups, self.apart)
        alike = Alike(fuser.inlined, written)
        for group in sorted(groups, key=Group.effort, reverse=True):
            try:
                sources[group] = alike.source(
                    group, lambda group: source_for(group, fuser.inlined, options, written)
                )
            except Exception as e:
                return group, e
            tuned = options.tune  # in a tile that nobody knows yet
            if not tuned and group not in likely and group not in small:
                # it compiles while others are written
                self._start(group, sources[group])
        candidates = [group for group in groups if group in likely]
        parts = find_parts(candidates, sources, self.apart, many)
        others = [group for group in candidates if group not in parts]
        parts |= find_beside(others, sources, self.apart, fuser.inlined, many)
        groups = _without_lone(groups, program, fuser, options, parts)
        steps = _launches(gm, program, fuser, groups, parts, options)
        if small:
            live = [g for s in steps for g in getattr(s, "groups", [s]) if isinstance(g, Group)]
            needs = needs_of(program, live, fuser.home, fuser.reads)
            joined = [s for s in steps if s in small]
            steps = join(steps, joined, sources, needs, output_node(gm.graph))
        groups = [step for step in steps if isinstance(step, Group)]
        for group in groups:
            try:
                if isinstance(group, Joined):
                    sources[group] = joined_source([sources[g] for g in group.groups])
                elif isinstance(group, Combined):
                    together = [parts[g] for g in group.groups]
                    sources[group] = together[0].together(together, many)
            except Exception as e:
                return group, e
            if group not in self.loading and not options.tune:
                self._start(group, sources[group])
        if options.tune:
            self._tune(groups, sources)
        plan = Plan(
            steps,
            groups,
            dict(program.aten),
            fuser.unfused,
            fuser.inlined,
            written,
            find_escapes(program, gm.graph),  # more than before: groups may be ATen's again
        )
        self._write(program, plan, {group: sources[group] for group in groups})
        return None

    def _tune(self, groups: list[Group], sources: dict[Group, Source]) -> None:
        """Put the kernels in the tiles that are fastest here, and start to compile them."""
        self.clock.lap(self.report, "emit")
        tuner = Tuner(self.options, self.device, self.report.label, hints_of(self.gm.graph))
        try:
            sources.update(tuner.run({group: sources[group] for group in groups}))
        except Exception as e:
            if self.options.strict:
                raise
            log.warning("graph %s keeps its tiles: %s: %s", self.report.label, type(e).__name__, e)
        self.report.tuned = tuner.tuned
        for group in groups:
            self._start(group, sources[group])
        self.clock.lap(self.report, "tune")

    def _start(self, group: Group, source: Source) -> None:
        index = self.device.index if self.device.type != "cpu" else None
        if source.key not in self.loads:
            self.loads[source.key] = Loading(source, self.options, index)
        self.loading[group] = self.loads[source.key]

    def _write(self, program: Program, plan: Plan, sources: dict[Group, Source]) -> None:
        report = self.report
        self.observe("fuse", plan)
        self.observe("emit", list(sources.values()))
        self.clock.lap(report, "emit")
        views = self.options.alone or self.report.kind != "inference"
        cut = self._cut(program, plan, sources)
        writer = self.writer = Writer(self.gm, program, plan, self.device, sources, views, cut)
        report.wrapper, report.peak_bytes = writer.write(), writer.peak_bytes
        self.clock.lap(self.report, "wrapper")
        pool = next((p for loading in self.loads.values() if (p := loading.pool)), None)
        self.code = Code(report.wrapper, report.label, pool)
        self.clock.lap(self.report, "bind")
        for line in report.captures.told() if report.captures is not None else ():
            log.info("graph %s: %s", report.label, line)
        report.plan, report.source_of, report.runs = plan, sources, writer.runs.made
        report.program = program
        report.sources = list({s.key: s for s in sources.values()}.values())
        report.found = {key: loading.found for key, loading in self.loads.items()}
        report.fused = sum(len(g.nodes) for g in plan.groups)
        report.kernels, report.launches = len(report.sources), writer.launches
        report.aten_calls = writer.calls
        report.constants = {name: _spelled(c) for name, c in writer.constants.items()}
        report.aten = dict(Counter(f"{node.target}: {why}" for node, why in plan.aten.items()))
        self.clock.lap(report, "wrapper")

    def _cut(self, program: Program, plan: Plan, sources: dict[Group, Source]) -> Cut | None:
        """What CUDA graphs hold; None where they hold nothing."""
        if self.facts is None:
            return None
        why = why_not(self.device)
        if why:
            self.report.captures = Captures(why_not=why)
            return None
        cut = Cut(self.gm, program, plan, sources, self.device, self.facts)
        self.report.captures = cut.captures
        return cut if cut.any else None

    def _give_up(self, group: Group, error: Exception) -> None:
        """Let ATen run a group's nodes, once and with a warning; strict mode raises.

        Kernels that fail together run each by itself first.
        """
        if self.options.strict:
            raise error
        nodes = group.nodes
        if isinstance(group, Combined):
            self.apart.update(nodes)
            many = len(group.groups)
            log.warning("%d kernels in one launch failed, and run apart: %s", many, error)
            return
        names = ", ".join(n.name for n in nodes[:6]) + (" ..." if len(nodes) > 6 else "")
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        fresh = [n for n in nodes if n not in self.deny]
        if not fresh:
            raise error
        self.deny.update(dict.fromkeys(fresh, f"its kernel failed ({why})"))
        message = f"{kernel_name(group.members)} ({names}) runs as ATen: {why}"
        self.report.failures.append(message)
        log.warning("%s", message)


def _spelled(constant: Any) -> str:
    """A constant as text; of a tensor or an object only the type, for its data may be large."""
    plain = isinstance(constant, (torch.dtype, torch.device, torch._ops.OpOverload))
    return str(constant) if plain else type(constant).__name__


def source_for(
    group: Group, inlined: set[Value], options: Options, written: Collection[Value] = ()
) -> Source:
    """One kernel's text."""
    if group.whole:
        return whole_source(group, options, written)
    target = options.target
    rows = product(group.sizes[a] for a in group.parallel)
    is_reduction = any(m.reduces or m.kind == "scan" for m in group.members)
    looped = is_reduction and needs_loop(rows, group.reduced_length, group.column, group.shares)
    body = emit(group, inlined, options.exact, looped)
    body.unaligned = [n for n, role, what in body.params if role == "in" and what in written]
    name = kernel_name(group.members)
    about = target.multiprocessors, target.backend, target.shared
    whole = Renderer(body, name, *about, waits=target.waits)
    more = {"exact": options.exact, "unaligned": body.unaligned}
    return Tiling(whole, inlined, options.exact, more).write()


def _launches(
    gm: GraphModule,
    program: Program,
    fuser: Fuser,
    groups: list[Group],
    parts: dict[Group, Part],
    options: Options,
) -> list[Any]:
    """What runs, in order: kernels alike together, and plain ATen calls among the rest as such."""
    steps = combine(gm, program, fuser, groups, parts)
    left = {
        s for s in steps if s in parts and not options.alone and _leave_alone(s, program, fuser)
    }
    if not left:
        return steps
    return combine(gm, program, fuser, [g for g in groups if g not in left], parts)


def _without_lone(
    groups: list[Group], program: Program, fuser: Fuser, options: Options, share: Collection[Group]
) -> list[Group]:
    """The groups, less those that ATen runs as fast and that do not ``share`` a launch."""
    if options.alone:
        return groups
    return [g for g in groups if g in share or not _leave_alone(g, program, fuser)]


def _leave_alone(group: Group, program: Program, fuser: Fuser) -> bool:
    """Give a group that is one plain ATen call back to ATen, which runs it as fast."""
    if len(group.members) != 1:
        return False
    (member,) = group.members
    if member.node is None:
        return False
    if member.kind not in ("pointwise", "cast", "concat", "patch", "reduce", "scan", "store"):
        return False
    if any(_is_worth_it(base_of(a), fuser) for a in member.inputs) or _is_faster(member):
        return False
    if any(reader.kind == "whole" for reader, _ in fuser.readers.get(member, ())):
        return False  # ATen pads in two steps
    if member.kind in ("pointwise", "cast") and (changes_layout(member) or leaves_gaps_out(member)):
        return False
    if member.kind in ("cast", "store") and base_of(member.args[0]).kind == "full":
        return False  # ATen would make what it copies
    if member.kind == "scan" and scans_rows(member, fuser.multiprocessors):
        return False
    node = member.node
    op = op_of(node.target)
    if node.target is operator.getitem or (op is not None and op.kind == "composite"):
        return False
    if isinstance(op, Authored):
        return False  # ATen has no kernel of it
    read = {base_of(a) for a in member.inputs}
    if member.kind == "store":
        read.add(base_of(member.params[0]))
    for source in node.all_input_nodes:
        entry = program.of.get(source)
        for value in [entry] if isinstance(entry, Value) else []:
            base = base_of(value)
            if base.kind in ("full", "iota"):
                continue
            if base in fuser.inlined or (base.computes and base not in read):
                return False  # ATen would read what no kernel stores
    fuser.turn(member, "buffer")
    program.aten[node] = "alone: nothing to fuse it with"
    del fuser.home[member]
    return True


def _is_faster(v: Value) -> bool:
    """Whether our kernel of a lone op is the faster one: GELU of 16-bit floats, which ATen computes
    with erf or tanh. Of 2 ** 26 in bfloat16 on an H200, in us (ATen, ours; copying takes 68):

        erf  90, 70   backward  121, 98   |   tanh  78, 68   backward  104, 98

    And sums that ``index_put`` makes of places that it sorts first, in some eight kernels.
    """
    if v.kind == "store":
        return v.params[-1] == "add" and v.node.target is torch.ops.aten.index_put_.default
    size = product(v.shape)
    quick = v.op in ("gelu", "gelu_backward") and v.dtype in SIXTEEN_BIT
    return quick and is_static(size) and size >= MUCH


def _is_worth_it(v: Value, fuser: Fuser) -> bool:
    """Whether v is the first step of a reduction that ATen would not run as fast: one that another
    kernel takes along, or one over the columns of much data (1.3 to 2.7 times as fast, H200)."""
    home = fuser.home.get(v)
    if v.node is not None or home is None:
        return False
    size = product(v.args[0].shape) if v.kind == "partial" else 0
    return len(home.members) > 1 or not is_static(size) or size >= MUCH


class _Clock:
    """Seconds a stage, summed over attempts."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.at = time.perf_counter()

    def lap(self, report: Report, stage: str) -> None:
        now = time.perf_counter()
        report.seconds[stage] = report.seconds.get(stage, 0.0) + now - self.at
        self.at = now


__all__ = ["Compilation", "Report", "compile_graph", "source_for"]
