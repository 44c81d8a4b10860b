"""What the page knows, as plain data: each text once, nodes as numbers, boxes with places, tables
folded. The scripts only show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from ..insight.rewritten import SAME, without_numbers
from ..insight.summary import grouped
from . import layout

Data = Mapping[str, Any]
NODE = ("name", "op", "result", "fate", "detail", "line", "module")


class Texts:
    """Texts by number: those of a model's layers repeat."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: Any) -> int:
        return self.numbers.setdefault(str(text), len(self.numbers))

    def all(self, texts: Iterable[Any]) -> list[int]:
        return [self(text) for text in texts]


def page_data(explanation: Data, times: Mapping[str, Sequence[float]] | None = None) -> Data:
    """``explanation``: of ``Explanation.to_dict()``; ``times``: see ``write``."""
    texts, sources = Texts(), {}
    graphs = []
    for graph in explanation["graphs"]:
        own = (times or {}).get(title_of(graph))
        if own is not None and len(own) != len(graph["calls"]):
            raise ValueError(
                f"{title_of(graph)}: {len(own)} times, where it has {len(graph['calls'])} calls"
            )
        graphs.append(_graph(graph, texts, own))
        sources.update(graph["sources"])
    return {
        "name": explanation["name"],
        "target": explanation["target"],
        "seconds": explanation["seconds"],
        **_of_dynamo(explanation),
        "graphs": graphs,
        "sources": sources,
        "texts": list(texts.numbers),
        "size": {
            "width": layout.WIDTH,
            "head": layout.HEAD,
            "line": layout.LINE,
            "label": layout.LABEL,
            "gutter": layout.GUTTER,
        },
    }


def _of_dynamo(explanation: Data) -> Data:
    """Where Dynamo cut the program, and what it compiled again: with the place of that graph."""
    lines = explanation["graph_break_lines"]
    place: dict[int, int] = {}
    for k, graph in enumerate(explanation["graphs"]):
        place.setdefault(graph["graph"], k)
    return {
        "breaks": [
            {"times": count, "reason": why, "lines": lines.get(why, [])}
            for why, count in explanation["graph_breaks"].items()
        ],
        "recompiles": [{**r, "place": place.get(r["graph"])} for r in explanation["recompiles"]],
        "gave_up": explanation["gave_up"],
    }


def title_of(graph: Data) -> str:
    return f"graph {graph['graph']} {graph['kind']}"


def _graph(graph: Data, texts: Texts, times: Sequence[float] | None) -> Data:
    nodes, calls = graph["nodes"], graph["calls"]
    number = {n["name"]: k for k, n in enumerate(nodes)}
    homes = _homes(nodes, number)
    members: list[list[int]] = [[] for _ in calls]
    views: list[list[int]] = [[] for _ in calls]
    for k, node in enumerate(nodes):
        for step in node["steps"]:
            members[step].append(k)
        home = homes[k]
        if not node["steps"] and home is not None:
            views[home].append(k)
    edges = [(k, step) for step, call in enumerate(calls) for k in call["inputs"]]
    lanes = layout.lanes_of([c["modules"][0] if c["modules"] else "" for c in calls])
    lines = [len(m) + bool(v) for m, v in zip(members, views, strict=True)]
    places = layout.place(lanes, lines, edges)
    boxes = [
        _box(call, texts, members[k], views[k], places[k], None if times is None else times[k])
        for k, call in enumerate(calls)
    ]
    return {
        "title": title_of(graph),
        "numbers": graph["numbers"],
        "seconds": graph["seconds"],
        "notes": _notes(graph),
        "nodes": [[*(texts(n[key]) for key in NODE), texts.all(n["inputs"])] for n in nodes],
        "inputs": [[name, kind] for name, kind in graph["inputs"].items()],
        "outputs": graph["outputs"],
        "boxes": boxes,
        "edges": edges,
        "lanes": [
            [n.label, round(n.x), round(n.y), round(n.width), round(n.height)] for n in lanes
        ],
        "refused": _refused(graph, {n["name"]: n["steps"] for n in nodes}, texts),
        "measured": times is not None,
        **_tables(graph, times),
    }


def _box(
    call: Data, texts: Texts, nodes: list[int], views: list[int], at: layout.Place, us: float | None
) -> Data:
    box = {
        "kind": call["kind"],
        "name": texts(call["name"]),
        "detail": texts(call["detail"]),
        "bytes": [call["read"], call["written"], call["eager"]],
        "parts": list(call["parts"]),
        "nodes": nodes,
        "views": views,
        "at": [round(at.x), round(at.y), round(at.height)],
        "us": us,
    }
    for key in ("reads", "writes", "ops", "lines", "modules"):
        box[key] = texts.all(call[key])
    return box


def _homes(nodes: Sequence[Data], number: Mapping[str, int]) -> list[int | None]:
    """The call that each node is shown in: its own; of a view, that of its first reader, whose
    addresses it is part of, or else that of what it looks at."""
    home: list[int | None] = [n["steps"][0] if n["steps"] else None for n in nodes]
    for k in reversed(range(len(nodes))):
        for name in nodes[k]["inputs"]:
            source, own = number.get(name), home[k]
            if source is None or nodes[source]["steps"] or own is None:
                continue
            old = home[source]
            home[source] = own if old is None else min(old, own)
    for k, node in enumerate(nodes):
        if home[k] is None:
            known = (home[number[name]] for name in node["inputs"] if name in number)
            home[k] = next((h for h in known if h is not None), None)
    return home


def _refused(graph: Data, steps: Mapping[str, Sequence[int]], texts: Texts) -> list[list[int]]:
    """(Call, other call, why they are not one) of each edge that was not fused."""
    found: dict[tuple[int, int], int] = {}
    for edge in graph["unfused"]:
        ends = [steps[name][0] for name in edge["nodes"] if steps.get(name)]
        if len(ends) == 2 and ends[0] != ends[1]:
            found.setdefault((min(ends), max(ends)), texts(edge["reason"]))
    return [[*pair, reason] for pair, reason in found.items()]


def _notes(graph: Data) -> list[list[str]]:
    notes = [["failed, and runs as ATen", text] for text in graph["failures"]]
    notes += [[name, graph[name]] for name in ("layout", "cache") if graph[name]]
    return notes + [[name, text] for name in ("captures", "tuned") for text in graph[name]]


# tables ------------------------------------------------------------------------------------------


def _tables(graph: Data, times: Sequence[float] | None) -> Data:
    calls = list(enumerate(graph["calls"]))
    kernels = [(k, c) for k, c in calls if c["kind"] == "kernel"]
    aten = [(k, c) for k, c in calls if c["kind"] == "aten"]
    steps = {n["name"]: n["steps"] for n in graph["nodes"]}
    ends = [
        (sorted({s for n in e["nodes"] for s in steps.get(n, ())}), e) for e in graph["unfused"]
    ]
    return {
        "saved": sorted(
            _folded(kernels, lambda c: (c["name"], c["detail"]), times),
            key=lambda row: (-row["saved"], row["steps"]),
        ),
        "aten": sorted(
            _folded(aten, lambda c: (c["name"], c["detail"], *c["reads"], *c["writes"]), times),
            key=lambda row: (-(row["us"] or 0), -row["moved"], row["steps"]),
        ),
        "unfused": _folded_edges(ends),
        "rewritten": _folded_rules(graph["rewritten"], itemgetter(*SAME)),
        "near_misses": _folded_rules(
            graph["near_misses"], lambda m: (m["rule"], without_numbers(m["reason"]))
        ),
    }


def _folded(
    calls: Iterable[tuple[int, Data]],
    key: Callable[[Data], Any],
    times: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """Equal calls as one row, with sums over all of them."""
    rows = []
    for same in grouped(calls, lambda item: key(item[1])):
        first = same[0][1]
        moved, eager = (
            sum(c["read"] + c["written"] for _, c in same),
            sum(c["eager"] for _, c in same),
        )
        rows.append(
            {
                **{name: first[name] for name in ("name", "detail", "reads", "writes", "ops")},
                "line": first["lines"][0] if first["lines"] else "",
                "steps": [k for k, _ in same],
                "moved": moved,
                "eager": eager,
                "saved": eager - moved,
                "us": None if times is None else sum(times[k] for k, _ in same),
            }
        )
    return rows


def _folded_edges(edges: Iterable[tuple[list[int], Data]]) -> list[Data]:
    names = ("producer", "consumer", "reason")
    rows = [
        {
            **{name: same[0][1][name] for name in (*names, "line")},
            "times": len(same),
            "bytes": sum(e["bytes"] for _, e in same),
            "steps": sorted({s for steps, _ in same for s in steps}),
            "modules": list(dict.fromkeys(e["module"] for _, e in same if e["module"])),
        }
        for same in grouped(edges, lambda item: tuple(item[1][n] for n in names))
    ]
    return sorted(rows, key=lambda row: (-row["bytes"], -row["times"]))


def _folded_rules(facts: Iterable[Data], key: Callable[[Data], Any]) -> list[Data]:
    """Equal layers as one row, which has the nodes of the first."""
    return [
        {
            **same[0],
            "times": len(same),
            "lines": list(dict.fromkeys(f["line"] for f in same if f["line"])),
            "modules": list(dict.fromkeys(f["module"] for f in same if f["module"])),
        }
        for same in grouped(facts, key)
    ]
