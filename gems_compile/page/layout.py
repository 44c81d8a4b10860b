"""Where the boxes of a graph stand: a row for each part of the model, in it the calls from left to
right. Equal layers so become equal rows, one below the other. Linear in boxes and edges.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, GAP_X, GAP_Y = 190, 56, 16  # of a box, and between boxes
HEAD, LINE = 40, 15  # heights of a box's title and of one of its ops
MOST_LINES = 8
MOST_LOOSE = 4  # calls below one another that no edge ties to their row
LABEL, GUTTER = 12, 200  # above a row, and left of it, for its name
GAP_LANES, GAP_COLUMNS = 18, 110
MOST_IN_A_LANE = (
    48  # calls; a busier part of the model is taken apart by the next number in its path
)
ASPECT = 1.7  # width by height of the whole

NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


@dataclass
class Lane:
    """A row: the calls of one part of the model that follow one another."""

    label: str
    boxes: list[int]
    x: float = 0
    y: float = 0
    width: float = 0
    height: float = 0


@dataclass
class Place:
    x: float
    y: float
    height: float


def lanes_of(modules: Sequence[str]) -> list[Lane]:
    """The row of each call, by its module's path: ``layers.3`` for ``layers.3.mlp.up``.

    A path without a number counts whole up to its first part; a call without one goes along with
    the call before it.
    """
    labels = _labels(modules)
    rows: dict[str, Lane] = {}
    for place, label in enumerate(labels):
        rows.setdefault(label, Lane(label, [])).boxes.append(place)
    # a row that starts with one early call (a saved value's) stands where most of its calls do
    return sorted(rows.values(), key=lambda lane: lane.boxes[len(lane.boxes) // 2])


def _labels(modules: Sequence[str]) -> list[str]:
    depth: dict[str, int] = defaultdict(int)  # of the labels that were taken apart
    labels = [_prefix(path, 0) for path in modules]
    while True:
        deeper: dict[str, set[str]] = defaultdict(set)
        for path, label in zip(modules, labels, strict=True):
            deeper[label].add(_prefix(path, depth[label] + 1))
        often = Counter(labels)
        split = {a for a, b in deeper.items() if often[a] > MOST_IN_A_LANE and len(b) > 1 and a}
        if not split:
            break
        further = {label: depth[label] + 1 for label in split}
        old, labels = labels, []
        for path, label in zip(modules, old, strict=True):
            labels.append(_prefix(path, further[label]) if label in split else label)
            depth[labels[-1]] = max(depth[labels[-1]], further.get(label, 0))
    last = next((label for label in labels if label), "")
    for k, label in enumerate(labels):
        labels[k] = last = label or last
    return labels


def _prefix(path: str, depth: int) -> str:
    """Up to and with the number at ``depth``, counted from 0, or the last that there is."""
    ends = [m.end() for m in NUMBER.finditer(path)]
    if not ends:
        return ".".join(path.split(".")[: depth + 1])
    return path[: ends[min(depth, len(ends) - 1)]]


def height_of(lines: int) -> float:
    return HEAD + LINE * min(lines, MOST_LINES)


def place(
    lanes: Sequence[Lane], lines: Sequence[int], edges: Iterable[tuple[int, int]]
) -> list[Place]:
    """A place for each box, and for each lane its own in it.

    ``lines``: how many ops each box lists; ``edges``: (box, later box that reads it).
    """
    ins: list[list[int]] = [[] for _ in lines]
    outs: list[list[int]] = [[] for _ in lines]
    for a, b in edges:
        ins[b].append(a)
        outs[a].append(b)
    places = [Place(0, 0, height_of(n)) for n in lines]
    most = max(16, math.isqrt(2 * len(lines)))  # columns; a longer row goes on below itself
    for lane in lanes:
        _place_lane(lane, _columns(lane, ins, outs), places, most)
    _flow(lanes, places)
    return places


def _columns(lane: Lane, ins: list[list[int]], outs: list[list[int]]) -> dict[int, int]:
    """A call stands right of those that it reads; one that reads none of its row, just left of
    its first reader."""
    column: dict[int, int] = {}
    starts, loose = [], 0
    for box in lane.boxes:
        before = [column[a] for a in ins[box] if a in column]
        column[box] = max(before) + 1 if before else 0
        if not before:
            starts.append(box)
    for box in reversed(starts):
        after = [column[b] for b in outs[box] if b in column]
        column[box] = max(min(after) - 1, 0) if after else loose // MOST_LOOSE
        loose += not after
    return column


def _place_lane(lane: Lane, column: dict[int, int], places: list[Place], most: int) -> None:
    """Boxes of a column stand below one another; coordinates start at the lane's corner."""
    stacked: dict[int, list[int]] = defaultdict(list)
    for box in lane.boxes:
        stacked[column[box]].append(box)
    top = float(LABEL)
    for start in range(0, max(column.values()) + 1, most):
        bottom = top
        for k in range(start, start + most):
            y = top
            for box in stacked.get(k, ()):
                places[box].x, places[box].y = GUTTER + (k - start) * (WIDTH + GAP_X), y
                y += places[box].height + GAP_Y
            bottom = max(bottom, y - GAP_Y)
        top = bottom + 2 * GAP_Y
    lane.width = max(places[box].x for box in lane.boxes) + WIDTH
    lane.height = top - 2 * GAP_Y


def _flow(lanes: Sequence[Lane], places: list[Place]) -> None:
    """Lanes below one another, in as many columns, as of a newspaper, as make the whole wide."""
    if not lanes:
        return
    total = sum(lane.height + GAP_LANES for lane in lanes)
    width = max(lane.width for lane in lanes) + GAP_COLUMNS
    columns = max(1, round(math.sqrt(ASPECT * total / width)))
    tall = total / columns
    x = y = widest = 0.0
    for lane in lanes:
        if y and y + lane.height / 2 > tall:
            x, y, widest = x + widest + GAP_COLUMNS, 0.0, 0.0
        lane.x, lane.y = x, y
        for box in lane.boxes:
            places[box].x += x
            places[box].y += y
        y += lane.height + GAP_LANES
        widest = max(widest, lane.width)
