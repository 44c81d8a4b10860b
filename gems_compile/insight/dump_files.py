"""``GEMS_DUMP=folder``: every stage of every compile as files, a folder a graph.

    graph_00_forward/
        dynamo.txt, dynamo_rewritten.txt   the traced program before and after the rewrites
        00_aten.py, 01_drop_no_ops.py ...  the graph after each pass, as Python that runs by itself
        rewrites.txt   what was rewritten and why, and what nearly was
        plan.txt       each launch and each ATen call in order, and why edges were not fused
        kernels/       each kernel, with the user's lines
        wrapper.py     the function that calls them
        references.py  what eager would compute for each launch; replay.py compares and times them
        report.json    all of it as data
        options.json   the options, where each came from, and the versions of everything
    index.html         a page of all graphs, written as the process ends

Graphs are counted in the order Dynamo compiles them, so the same program gives the same names. A
dump must not stop a compile: a disk that is full costs one warning.
"""

from __future__ import annotations

import atexit
import glob
import itertools
import json
import logging
import os
import re
import shutil
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ..dynamo import Recompile
from ..lowering import private
from ..lowering.report import Report
from .machine import facts
from .plan import in_modules, indented, plan_text, times
from .replay_files import replay_of
from .rewritten import SAME, NearMiss, Rewritten, without_numbers
from .runnable import to_python
from .summary import GraphSummary, grouped, summarize

log = logging.getLogger(__name__)

WHAT = {
    "aten": "The graph as AOTAutograd made it.",
    "take_foreach_apart": "After taking multi-tensor ops apart, a node a tensor.",
    "inline_functionalized_ops": "After inlining custom ops that mutate their arguments.",
    "drop_no_ops": "After dropping views, copies and casts that change nothing.",
    "drop_duplicates": "After merging equal calls.",
    "reinplace_updates": "After turning functional updates back into updates in place.",
}
_numbers: dict[str, itertools.count[int]] = {}
_taken: set[str] = set()
_warned: set[str] = set()


class Session:
    """The dumps of one Dynamo graph: what it becomes is one forward graph, or also a backward."""

    def __init__(self, folder: str, options: Mapping[str, Any] | None = None) -> None:
        """``options``: as ``config.told`` has them, for ``options.json``."""
        self.root = _of_this_rank(folder)
        if self.root not in _numbers:
            atexit.register(_write_page, self.root)
        self.options = options or {}
        self.clock = Clock()
        self.number = next(_numbers.setdefault(self.root, itertools.count()))
        self.texts: dict[str, str] = {}  # files that wait for the folder of the forward graph
        self.dynamo_did: dict[str, Any] = {}

    def dynamo(self, gm: GraphModule, name: str) -> None:
        """Keep Dynamo's graph as text; the rewrites edit it in place."""
        with _guarded(self.root):
            self.texts[name] = gm.print_readable(print_output=False)

    def around(self, again: Recompile | None, breaks: Sequence[tuple[str, str]]) -> None:
        """Why Dynamo compiled again, and where it cut the program since the graph before."""
        self.dynamo_did = {
            "recompile": None if again is None else again.to_dict(),
            "graph_breaks": [{"reason": why, "line": line} for why, line in breaks],
        }

    def start(self, kind: str) -> Dump:
        did = self.dynamo_did if kind != "backward" else {}
        dump = Dump(self.root, self._fresh(kind), self.clock, did)
        with _guarded(dump.path):
            dump.write("options.json", _json({"options": self.options, **facts()}))
        if kind != "backward":
            for name, text in self.texts.items():
                dump.write(name, text)
        return dump

    def _fresh(self, kind: str) -> str:
        """A folder no other graph of this process has; what an earlier process left there goes."""
        name = f"graph_{self.number:02}_{kind}"
        for k in itertools.count(2):
            path = os.path.join(self.root, name)
            if path not in _taken:
                break
            name = f"graph_{self.number:02}_{kind}_{k}"
        _taken.add(path)
        with _guarded(path):
            if os.path.isfile(os.path.join(path, "00_aten.py")) and not os.path.islink(path):
                shutil.rmtree(path)
        return name


class Dump:
    """One graph's folder. ``observe`` is for ``compile_graph``, ``finish`` for its report."""

    def __init__(
        self,
        root: str,
        name: str,
        clock: Clock | None = None,
        dynamo_did: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.path = name, os.path.join(root, name)
        self.dynamo_did = dynamo_did or {}
        self.clock = clock
        self.earlier = clock.until_now() if clock is not None else {}  # stage -> seconds
        self.passes = 0
        self.before = ""  # the last graph's file, without its title

    def observe(self, stage: str, thing: Any) -> None:
        """A graph after a pass becomes a file; the later stages are written by ``finish``."""
        if isinstance(thing, GraphModule):
            with _guarded(self.path):
                name = f"{self.passes:02}_{stage}.py"
                title = WHAT.get(stage, f"After {stage.replace('_', ' ')}.")
                text = to_python(thing, f"{self.name}/{name}\n\n{title}")
                after = text.partition(title)[2]
                if after == self.before:
                    text = text.replace(title, f"{title[:-1]}: nothing to do here.", 1)
                self.before = after
                self.write(name, text)
            self.passes += 1

    def finish(self, report: Report) -> None:
        with _guarded(self.path):
            summary = summarize(report)
            self.write("rewrites.txt", rewrites_text(summary))
            self.write("plan.txt", plan_text(summary))
            data, told = self._replay(report)
            for source in report.sources:
                name = f"{_file_name(source.name)}_{source.key[:8]}.py"
                text = _kernel_text(source, summary)
                self.write(
                    f"kernels/{name}", f"{text}\n\n{told.get(source.key, '')}".rstrip() + "\n"
                )
            if report.wrapper:
                self.write("wrapper.py", _wrapper_text(report))
            more = {"timings": timings(self.earlier, report), "caches": caches(report)}
            more |= self.dynamo_did
            self.write("report.json", _json({**summary.to_dict(), "replay": data, **more}))
        if self.clock is not None:
            self.clock.resume()

    def _replay(self, report: Report) -> tuple[dict[str, Any], dict[str, str]]:
        """What ``replay.py`` needs; a graph without it still has all other files."""
        with _guarded(self.path):
            return replay_of(report, self.write)
        return {}, {}

    def failed(self, error: BaseException) -> None:
        """The compiler failed on this graph, which runs as ATen: keep the traceback."""
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        self.write("failure.txt", "".join(lines))

    def write(self, name: str, text: str) -> None:
        """The whole file or none of it: a reader never sees half of one."""
        with _guarded(self.path):
            path = os.path.join(self.path, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            partial = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                with open(partial, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(partial, path)
            except OSError:
                if os.path.exists(partial):
                    os.unlink(partial)
                raise


def _json(data: Any) -> str:
    return json.dumps(data, indent=1) + "\n"


def _write_page(root: str) -> None:
    """Once for all graphs, as the process ends."""
    from ..page.of_dump import write_page

    with _guarded(os.path.join(root, "page")):
        if glob.glob(os.path.join(glob.escape(root), "graph_*", "report.json")):
            write_page(Path(root))


@contextmanager
def _guarded(where: str) -> Iterator[None]:
    """A dump that fails warns once a folder, and the compile goes on."""
    try:
        yield
    except Exception as error:
        root = os.path.dirname(where)
        if root not in _warned:
            _warned.add(root)
            reason = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            log.warning("the dump in %s is not complete: %s", where, reason)


def _of_this_rank(folder: str) -> str:
    """A folder of its own for each process of a distributed run."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return os.path.join(folder, f"rank_{dist.get_rank()}")
    return folder


def _file_name(name: str) -> str:
    return re.sub(r"\W", "_", name)[:80]


# what report.json adds ---------------------------------------------------------------------------


class Clock:
    """Seconds of one of Dynamo's graphs on its way to an ATen graph; what we do with that, reports
    count by themselves."""

    def __init__(self) -> None:
        dynamo = private.seconds_of_dynamo()
        self.seconds = {} if dynamo is None else {"Dynamo": dynamo}
        self.at = time.perf_counter()

    def rewritten(self) -> None:
        """The rewrites are done, and AOTAutograd begins."""
        self.seconds["rewrites"] = time.perf_counter() - self.at
        self.at = time.perf_counter()

    def resume(self) -> None:
        """AOTAutograd goes on: a backward follows."""
        self.at = time.perf_counter()

    def until_now(self) -> dict[str, float]:
        """AOTAutograd's are of the forward graph, or of the backward that came behind it."""
        return {**self.seconds, "AOTAutograd": time.perf_counter() - self.at}


def timings(before: Mapping[str, float], report: Report) -> dict[str, float]:
    """Stage -> seconds, in order."""
    return {name: round(s, 6) for name, s in {**before, **report.seconds}.items()}


def caches(report: Report) -> dict[str, Any]:
    """The whole graph: hit, miss or off, and why; and of each kernel whether it was there."""
    kernels = {f"{s.name}_{s.key[:8]}": report.found.get(s.key, "") for s in report.sources}
    return {"graph": report.cache, "kernels": kernels}


# the texts ---------------------------------------------------------------------------------------


def rewrites_text(summary: GraphSummary) -> str:
    """What fired, with the nodes before and after, and what nearly did; equal layers once."""
    lines = [f"{summary.title}: rewrites", ""]
    if summary.kind == "backward":
        return f"{lines[0]}\n\nA backward follows from its forward: see that one's rewrites.\n"
    if not summary.rewritten:
        lines.append("Nothing was rewritten.")
    for same in grouped(summary.rewritten, attrgetter(*SAME)):
        first, count = same[0], len(same)
        lines.append(
            f"{first.rule}{times(count)}: {first.nodes_before} nodes became {first.nodes_after}"
        )
        lines += indented(f"because {first.because}", *_places(same))
        for name, chain in (("before", first.before), ("after", first.after)):
            lines += [*indented(f"{name}:" if chain else ""), *indented(*chain, by=8)]
        lines.append("")
    if summary.near_misses:
        lines += ["", "Nearly rewritten, and left as they were:", ""]
    for missed in grouped(summary.near_misses, lambda m: (m.rule, without_numbers(m.reason))):
        miss, count = missed[0], len(missed)
        lines.append(f"{miss.rule}{times(count)} at {miss.node}: {miss.reason}")
        lines += [*indented(*_places(missed)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _places(found: Sequence[Rewritten] | Sequence[NearMiss]) -> list[str]:
    """The lines and the modules of what is told once."""
    lines = dict.fromkeys(f.line for f in found)
    return [*lines, in_modules(f.module for f in found if f.module)]


def _kernel_text(source: Any, summary: GraphSummary) -> str:
    """The kernel behind a header that says where it is launched, and on what."""
    places = [
        (k, c)
        for k, c in enumerate(summary.calls)
        if c.kind == "kernel" and c.detail == source.key[:8]
    ]
    head = [f"# {summary.title}: launched {len(places)} time{'s' * (len(places) != 1)} a call"]
    for k, call in places:
        head.append(f"#   step {k}: ({', '.join(call.reads)}) -> {', '.join(call.writes)}")
        head += [f"#     in {module}" for module in call.modules]
    meta = source.meta
    constants = ", ".join(f"{k}={v}" for k, v in meta.get("constants", {}).items())
    head.append(f"# {constants}, num_warps={meta.get('num_warps')}, grid={source.grid}")
    return "\n".join(head) + "\n\n" + source.commented


def _wrapper_text(report: Report) -> str:
    """The generated function, behind a list of what its names stand for."""
    head = [
        "# What one call of the graph runs. Not a program: these names are put in by the executor.",
        "#   r0, r1 ...   launch the kernels that follow, in one call of the native launcher where",
        "#                that is there; kernel by kernel they stand above the function",
        "#   m5, m9 ...   torch.mm of memory: (tensor, bytes ahead) of both factors, and result",
        "#   r0w ...      the same kernels with 64-bit places, for sizes above wide0, wide1 ...",
        "#   k0, k1 ...   launch a kernel: (grid x, y, z, stream, arguments)",
        "#   empty, view  allocate, and look at memory with another shape, without a dispatcher",
        "#   seed         draws dropout's seed: memory that a kernel stores it in, and the number",
        "#   aligned, settle   a copy, only if a tensor lacks the alignment or strides foreseen",
    ]
    head += [f"#   {name} = {what}" for name, what in report.constants.items()]
    runs = [run.as_python() for run in report.runs]
    return "\n\n".join(["\n".join(head), *runs, report.wrapper])
