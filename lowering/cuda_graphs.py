"""Pieces of compiled functions as CUDA graphs, captured when they run and replayed from then on."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import captured, private
from .copies import alias, own, own_together
from .cut import Captures, Facts, Piece
from .lending import Lender

log = logging.getLogger("gems_compile.lowering.cuda_graphs")

#: graphs of one piece, by the sizes it is called with
MOST_SIZES = 16
#: times that a piece is warmed up or recorded for one set of sizes
MOST_RECORDINGS = 32


def facts_of(gm: GraphModule, kind: str) -> Facts:
    """What AOTAutograd, which compiles the graph now, knows of it."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fixed = private.static_inputs()
    if kind == "backward":  # what it has of the forward's inputs keeps their names
        names = {f"primals_{k + 1}" for k in fixed}
        saved = {n for n in inputs if not n.name.startswith(("primals_", "tangents_"))}
        return Facts(kind, {n for n in inputs if n.name in names}, saved, None)
    static: set[Node] = {inputs[k] for k in fixed if k < len(inputs)}
    return Facts(kind, static, set(), private.visible_outputs() if kind == "forward" else None)


def why_not(device: torch.device) -> str:
    """Why nothing is captured on a device; empty where graphs are."""
    return captured.machinery(device)[1]


class Turns:
    """One call at a time on a device, for its graphs have one set of buffers: a call on another
    stream waits for all that the last one's stream was given."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stream: int | None = None
        self.lenders: dict[Lender, None] = {}  # whose last results may still be held

    def take(self, trees: Any, forward: bool) -> None:
        if forward and self.lenders:
            for lender in self.lenders:
                lender.look(trees)
            self.lenders.clear()
        stream = trees.stream()
        if stream != self.stream:
            if self.stream is not None:
                trees.wait_for(self.stream)
            self.stream = stream


_turns: defaultdict[int, Turns] = defaultdict(Turns)


class Captured:
    """A piece that runs as a CUDA graph, one for each set of ``numbers`` it is called with."""

    def __init__(self, piece: Piece, function: Callable[..., Any], trees: Any) -> None:
        self.piece, self.function, self.trees = piece, function, trees
        self.graphs: dict[tuple[Any, ...], tuple[Recorded, Callable[..., Any]] | None] = {}
        self.backward = piece.kind == "backward"
        self.lender: Lender | None = None  # of a backward

    def __call__(self, numbers: tuple[Any, ...], args: list[Any]) -> Any:
        graph = self.graphs[numbers] if numbers in self.graphs else self._new(numbers, args)
        if graph is None or not self._may_run(args):
            return self.function(args, *numbers)
        recorded, run = graph
        if 1 < recorded.times < MOST_RECORDINGS:
            return run(args)
        return self._begin(numbers, recorded, run, args)

    def _begin(
        self, numbers: tuple[Any, ...], recorded: Recorded, run: Callable[..., Any], args: list[Any]
    ) -> Any:
        """The first calls, or the last."""
        if recorded.times >= MOST_RECORDINGS:
            self.graphs[numbers] = None
            self._note(
                f"was recorded {MOST_RECORDINGS} times, as what it finds in memory changes from "
                "call to call; it runs without a graph from now on",
            )
            return self.function(args, *numbers)
        again = list(args)  # recording clears them
        try:
            return run(args)
        except Exception as e:
            if recorded.times < 2 or self.backward:  # it ran, or may not hold on to its inputs
                raise
            self.graphs[numbers] = None
            self._note(f"cannot be recorded ({type(e).__name__}: {e})", logging.WARNING)
            return self.function(again, *numbers)

    def _may_run(self, args: list[Any]) -> bool:
        if self.trees.capturing():  # the program's own graph
            return False
        if self.backward and private.backward_keeps_graph():
            self._note("runs without a graph under retain_graph=True: its memory stays in use")
            return False
        if self.trees.would_overwrite():
            self._note("runs without a graph while earlier results wait for a backward")
            return False
        return not self.piece.mixed or all(a.is_cuda for a in args)

    def _new(self, numbers: tuple[Any, ...], args: list[Any]) -> Any:
        if len(self.graphs) >= MOST_SIZES:
            self._note(f"was captured for {MOST_SIZES} sets of sizes; others run without")
            return None
        piece = self.piece
        recorded = Recorded(piece, self.function, numbers, self.lender)
        run = self.trees.wrap(recorded.model, args, piece.static, piece.kind, piece.results)
        self.graphs[numbers] = recorded, run
        return self.graphs[numbers]

    def _note(self, text: str, level: int = logging.INFO) -> None:
        note = f"{self.piece.name} of the {self.piece.kind} {text}"
        if note not in self.piece.notes:
            self.piece.notes.append(note)
            log.log(level, "%s", note)


class Recorded:
    """What the trees record, and keep as long as anything runs it: nothing here does.

    ``times``: how often it was warmed up or recorded.
    """

    def __init__(
        self,
        piece: Piece,
        function: Callable[..., Any],
        numbers: tuple[Any, ...],
        lender: Lender | None,
    ) -> None:
        self.piece, self.function, self.numbers, self.lender = piece, function, numbers, lender
        self.times = 0

    def model(self, args: list[Any]) -> Any:
        self.times += 1
        return self.function(args, *self.numbers)

    @property
    def held(self) -> Sequence[int]:
        """Which of its results, as it returned them, something may hold between two steps."""
        if self.lender is not None and self.lender.lent:
            return range(self.piece.results)
        return () if self.piece.saved is None else (self.piece.saved,)


def in_turn(call: Callable[..., Any], device: torch.device, kind: str) -> Callable[..., Any]:
    """The compiled function, one call at a time: what it copies out of its graphs' memory is on its
    way before another call writes there."""
    trees = captured.machinery(device)[0]
    if trees is None:
        return call
    turns, forward = _turns[trees.index], kind != "backward"

    def run(args: list[Any]) -> Any:
        if trees.capturing():
            return call(args)
        with turns.lock:
            turns.take(trees, forward)
            return call(args)

    return run


def bound(captures: Captures, scope: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What the wrapper's graph0, graph1 ... and own are; ``scope`` has its part0, part1 ..."""
    trees, why = captured.machinery(device)
    if trees is None and captures.pieces:
        captures.why_not = why
    functions = {
        piece.name: scope[piece.name.replace("graph", "part")] for piece in captures.pieces
    }
    found: dict[str, Any] = {"own": own, "own_together": own_together, "alias": alias}
    if trees is None:
        return {**found, **{name: _plain(f) for name, f in functions.items()}}
    graphs = {p.name: Captured(p, functions[p.name], trees) for p in captures.pieces}
    if captures.pieces[0].kind == "backward":
        lender = Lender(_turns[trees.index].lenders)
        found.update(own=partial(lender, own), own_together=partial(lender, own_together))
        for graph in graphs.values():
            graph.lender = lender
    return {**found, **graphs}


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda numbers, args: function(args, *numbers)
