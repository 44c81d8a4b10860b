"""Pieces of compiled functions as CUDA graphs, captured when they run and replayed from then on."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import captured, private
from .copies import alias, own, own_together
from .cut import Captures, Facts, Piece
from .graph import output_node, saved_inputs
from .lending import Lender

log = logging.getLogger("gems_compile.lowering.cuda_graphs")

#: graphs of one piece, by the sizes it is called with
MOST_SIZES = 16
#: times that a piece is warmed up or recorded for one set of sizes
MOST_RECORDINGS = 32


def facts_of(gm: GraphModule, kind: str, outside: Collection[str]) -> Facts:
    """What AOTAutograd, which compiles the graph now, knows of it; and what the forward said of
    itself: see ``Captures``."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fixed = private.static_inputs()
    if kind == "backward":  # what it has of the forward's inputs keeps their names
        names = {f"primals_{k + 1}" for k in fixed}
        saved = {n for n in saved_inputs(gm.graph) if n.name not in outside}
        return Facts(kind, {n for n in inputs if n.name in names}, saved, None, [])
    static: set[Node] = {inputs[k] for k in fixed if k < len(inputs)}
    results: Any = output_node(gm.graph).args[0]
    results = [n.name if isinstance(n, Node) else "" for n in results]
    visible = private.visible_outputs() if kind == "forward" else None
    return Facts(kind, static, set(), visible, results)


def why_not(device: torch.device) -> str:
    """Why nothing is captured on a device; empty where graphs are."""
    return captured.machinery(device)[1]


class Turns:
    """One call at a time on a device, for its graphs have one set of buffers: a call on another
    stream waits for all that the last one's stream was given."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stream: int | None = None
        #: whose last results may still be held, and what keeps the memory of those that were lent
        self.lenders: dict[Lender, InTurn] = {}

    def take(self, trees: Any, forward: bool) -> None:
        if forward and self.lenders:
            for lender in self.lenders:
                lender.look(trees)
            self.lenders = {one: keeps for one, keeps in self.lenders.items() if one.watched}
        stream = trees.stream()
        if stream != self.stream:
            if self.stream is not None:
                trees.wait_for(self.stream)
            self.stream = stream


_turns: defaultdict[int, Turns] = defaultdict(Turns)


class Captured:
    """A piece that runs as a CUDA graph, one for each set of ``numbers`` it is called with."""

    def __init__(
        self, piece: Piece, function: Callable[..., Any], trees: Any, lender: Lender | None
    ) -> None:
        self.piece, self.function, self.trees, self.lender = piece, function, trees, lender
        self.graphs: dict[tuple[Any, ...], tuple[Recorded, Callable[..., Any]] | None] = {}

    def __call__(self, numbers: tuple[Any, ...], args: list[Any]) -> Any:
        if self.piece.mixed and not all(a.is_cuda for a in args):
            return self.function(args, *numbers)
        if numbers not in self.graphs:
            return self._first(numbers, args)
        graph = self.graphs[numbers]
        if graph is None:
            return self.function(args, *numbers)
        recorded, run = graph
        if 1 < recorded.times < MOST_RECORDINGS:
            return run(args)
        return self._begin(numbers, recorded, run, args)

    def _begin(
        self, numbers: tuple[Any, ...], recorded: Recorded, run: Callable[..., Any], args: list[Any]
    ) -> Any:
        """The second call, or the last."""
        if recorded.times >= MOST_RECORDINGS:
            self.graphs[numbers] = None
            _note(
                self.piece,
                f"was recorded {MOST_RECORDINGS} times, as what it finds in memory changes from "
                "call to call; it runs without a graph from now on",
            )
            return self.function(args, *numbers)
        if self.lender is not None:  # what forward saved shall die where the recording has read it
            return run(args)
        again = list(args)  # recording clears them
        try:
            return run(args)
        except Exception as e:
            if recorded.times < 2:  # it ran, not only was it recorded
                raise
            self.graphs[numbers] = None
            _note(self.piece, f"cannot be recorded ({type(e).__name__}: {e})", logging.WARNING)
            return self.function(again, *numbers)

    def _first(self, numbers: tuple[Any, ...], args: list[Any]) -> Any:
        piece = self.piece
        if len(self.graphs) >= MOST_SIZES:
            _note(piece, f"was captured for {MOST_SIZES} sets of sizes; others run without")
            return self.function(args, *numbers)
        recorded = Recorded(piece, self.function, numbers, self.lender)
        run, results = self.trees.first(
            recorded.model, args, piece.static, piece.kind, piece.results
        )
        self.graphs[numbers] = recorded, run
        return results


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


class InTurn:
    """The compiled function, one call at a time: what it copies out of its graphs' memory is on its
    way before another call writes there.

    ``plain`` is the same without graphs, and without copies; ``lender`` is a backward's.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        plain: Callable[..., Any],
        piece: Piece,
        trees: Any,
        lender: Lender | None,
    ) -> None:
        self.call, self.plain, self.piece, self.trees = call, plain, piece, trees
        self.turns, self.lender = _turns[trees.index], lender

    def __call__(self, args: list[Any]) -> Any:
        if self.trees.capturing():  # the program's own graph
            return self.plain(args)
        with self.turns.lock:
            self.turns.take(self.trees, self.lender is None)
            if self._must_run_plainly():
                return self.plain(args)
            results = self.call(args)
            if self.lender is not None and self.lender.watched:
                self.turns.lenders[self.lender] = self
            return results

    def _must_run_plainly(self) -> bool:
        if self.lender is not None and private.backward_keeps_graph():
            _note(self.piece, "runs without a graph under retain_graph=True")
            return True
        if self.trees.would_overwrite():
            _note(self.piece, "runs without a graph while earlier results wait for a backward")
            return True
        return False


def _note(piece: Piece, text: str, level: int = logging.INFO) -> None:
    note = f"{piece.name} of the {piece.kind} {text}"
    if note not in piece.notes:
        piece.notes.append(note)
        log.log(level, "%s", note)


def in_turn(
    captures: Captures,
    device: torch.device,
    scope: Mapping[str, Any],
    made: Callable[[dict[str, Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """The function that replays its graphs. ``made`` makes it of what the wrapper's graph0, graph1
    ... and own are; ``scope`` has its part0, part1 ..."""
    trees, why = captured.machinery(device)
    functions = {p: scope[p.name.replace("graph", "part")] for p in captures.pieces}
    plain = made(
        {
            **{p.name: partial(_without_graph, function) for p, function in functions.items()},
            **dict.fromkeys(("own", "own_together"), lambda *results: results),
            "alias": lambda result: result,
        }
    )
    if trees is None:  # on another machine than the one that compiled this
        captures.why_not = why
        return plain
    copies: dict[str, Any] = {"own": own, "own_together": own_together, "alias": alias}
    lender = Lender() if captures.pieces[0].kind == "backward" else None
    if lender is not None:
        copies.update(own=partial(lender, own), own_together=partial(lender, own_together))
    graphs = {p.name: Captured(p, f, trees, lender) for p, f in functions.items()}
    return InTurn(made({**copies, **graphs}), plain, captures.pieces[0], trees, lender)


def _without_graph(function: Callable[..., Any], numbers: tuple[Any, ...], args: list[Any]) -> Any:
    return function(args, *numbers)
