"""An explanation as one HTML file that opens from disk: the graph, the launches, what was saved.

``data`` says what the page knows, ``layout`` where its boxes stand; ``page.html``, ``page.css`` and
the scripts show it. The file needs no network, and the same explanation gives the same bytes.
"""

from __future__ import annotations

import html
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .data import page_data

#: in the order in which they use one another
SCRIPTS = ("core", "view", "strip", "pointer", "panel", "tables", "main")
Times = Mapping[str, Sequence[float]]


def write(explanation: Mapping[str, Any], path: str | Path, times: Times | None = None) -> None:
    """Write the page of ``Explanation.to_dict()``, the whole file or none of it.

    ``times``: graph's title ("graph 0 forward") -> microseconds of each of its calls, in order.
    Raises ValueError where a graph has other than one time a call.
    """
    text = render(explanation, times)
    partial = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        Path(partial).write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise


def render(explanation: Mapping[str, Any], times: Times | None = None) -> str:
    """The page's text."""
    data = json.dumps(page_data(explanation, times), separators=(",", ":"), sort_keys=True)
    parts = {
        "title": html.escape(f"{explanation['name']}: gems"),
        "style": _file("page.css"),
        # no "<" in the data: nothing in it can end its element
        "data": data.replace("<", "\\u003c"),
        "script": "\n".join(_file(f"{name}.js") for name in SCRIPTS),
    }
    pieces = _file("page.html").split("@@")  # text, a part's name, text, ...
    return "".join(parts[piece] if k % 2 else piece for k, piece in enumerate(pieces))


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
