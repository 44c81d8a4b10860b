"""The page of a dump's folder: of the graphs' ``report.json``, and of ``times.json`` if
``replay.py --bench`` has written one."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DumpError
from . import write
from .data import title_of

NAME = "index.html"


def main(folder: str, out: str | None, as_json: bool) -> int:
    """``python -m gems_compile page``; 2 where there is no dump."""
    try:
        path = write_page(Path(folder), None if out is None else Path(out))
    except DumpError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"page": str(path)}) if as_json else path)
    return 0


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Write ``index.html`` in the folder, or ``out``; returns where it is.

    Raises: DumpError where no graph was dumped there, or a report cannot be read
    """
    found = sorted(folder.glob("graph_*/report.json"), key=_in_order)
    if not found:
        raise DumpError(
            f"{folder} has no dump of a graph; GEMS_DUMP={folder} makes one of each that compiles"
        )
    measured = _read(folder / "times.json") if (folder / "times.json").exists() else {}
    graphs, times = [], {}
    for path in found:
        graph = _read(path)
        graphs.append(graph)
        own = measured.get(path.parent.name)
        if own is not None and len(own) == len(graph["calls"]):
            # what could not be timed has no width
            times[title_of(graph)] = [us or 0.0 for us in own]
    options = found[0].parent / "options.json"
    facts = _read(options) if options.exists() else {}
    explanation = {
        "name": folder.resolve().name,
        "target": facts.get("target", "unknown"),
        "seconds": {},
        **_of_dynamo(graphs),
        "graphs": graphs,
    }
    path = folder / NAME if out is None else out
    write(explanation, path, times)
    return path


def _of_dynamo(graphs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recompiles and graph breaks, as ``Explanation.to_dict`` has them."""
    breaks = [b for graph in graphs for b in graph.get("graph_breaks", ())]
    lines: dict[str, dict[str, None]] = {}
    for b in breaks:
        lines.setdefault(b["reason"], {})[b["line"]] = None
    again = [(graph["graph"], graph.get("recompile")) for graph in graphs]
    return {
        "graph_breaks": dict(Counter(b["reason"] for b in breaks)),
        "graph_break_lines": {why: list(filter(None, found)) for why, found in lines.items()},
        "recompiles": [{**facts, "graph": number} for number, facts in again if facts],
        "gave_up": 0,  # a dump does not know
    }


def _in_order(path: Path) -> tuple[str, bool]:
    """A forward ahead of its backward."""
    name = path.parent.name
    return name.replace("_backward", "_forward"), "_backward" in name


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DumpError(f"{path} cannot be read: {error}") from error
