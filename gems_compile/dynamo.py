"""What Dynamo did around our graphs: where it cut the program, and why it compiled again."""

from __future__ import annotations

import linecache
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .lowering import private

log = logging.getLogger(__name__)

LIMIT = "Dynamo recompile limit exceeded"
TORCH = os.path.dirname(torch.__file__) + os.sep
RESUME = re.compile(r"torch_dynamo_resume_in_(.+)_at_(\d+)$")


@dataclass(frozen=True)
class Recompile:
    """A function that was compiled once more.

    graph:  the number of the graph that came of it
    change: what had changed, in words; ``guard`` in Dynamo's, of the version that was used last
    older:  why the other versions did not fit, in Dynamo's words
    line:   the line that depends on it, as far as Dynamo knows, else the function's first
    """

    graph: int
    compile_id: str
    function: str
    line: str
    change: str
    hint: str
    guard: str
    older: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.function} was compiled again: {self.change}; {self.hint}"


def recompile(graph: int) -> Recompile | None:
    """Of the graph that Dynamo gives us now; None where its function is compiled the first time."""
    found = private.recompiled()
    if found is None:
        return None
    compile_id, code, (guard, *older) = found
    guard, line = _with_line(guard, code)
    change, hint = in_words(guard)
    name, line = _function(code), "" if _is_torchs(code) else line
    others = tuple(_with_line(text, code)[0] for text in older)
    again = Recompile(graph, compile_id, name, line, change, hint, guard, others)
    log.info("graph %d: %s  %s", graph, again, line)
    return again


def _function(code: Any) -> str:
    """``Model.forward``; of what Dynamo made of a function behind a break, that function."""
    resumed = RESUME.match(code.co_name)
    if resumed is not None:
        return f"{resumed[1]}, behind line {resumed[2]},"
    if _is_torchs(code):
        return "a module of torch's"
    name: str = getattr(code, "co_qualname", code.co_name)  # since Python 3.11
    return name.rpartition("<locals>.")[2]


def _is_torchs(code: Any) -> bool:
    """Whether it is what Dynamo puts around a module whose code is torch's."""
    return code.co_filename.replace("\\", "/").endswith("torch/_dynamo/external_utils.py")


def _with_line(guard: str, code: Any) -> tuple[str, str]:
    """A guard as it stands, and the line it came from: ``n == 3   # y * n  # a.py:14 in f``, and
    since torch 2.13 the calls that led there below it."""
    first, *below = guard.split("\n")
    text, *remarks = [part.strip() for part in first.split(" # ")]
    frames = re.findall(r'File "(.+?)", line (\d+)', "\n".join(below))
    for path, number in reversed(frames):
        if not path.startswith(TORCH):
            return text, line_of(path, int(number))
    for remark in reversed(remarks):
        place = re.match(r"(\S+):(\d+) in ", remark)
        if place is not None and os.path.basename(place[1]) == os.path.basename(code.co_filename):
            return text, line_of(code.co_filename, int(place[2]))
    return text, line_of(code.co_filename, code.co_firstlineno)


def line_of(path: str, number: int) -> str:
    """``model.py:42  return self.ln(h)``, as ``summary`` has lines."""
    return f"{os.path.basename(path)}:{number}  {linecache.getline(path, number).strip()}".rstrip()


# guards in words ---------------------------------------------------------------------------------

TENSOR = r"tensor '(?P<name>.+?)' "
NUMBERS = r"\. expected (?P<old>.+?),? actual (?P<new>.+)"


def _size(m: re.Match[str]) -> tuple[str, str]:
    name, dim = m["name"], m["dim"]
    tensor = "tensor" if name.startswith("argument ") else name
    return (
        f"size of {name}, dim {dim}, changed {m['old']} -> {m['new']}",
        f"torch.compile(..., dynamic=True) or torch._dynamo.mark_dynamic({tensor}, {dim}) "
        "compiles once for all sizes",
    )


def _stride(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"stride of {m['name']}, dim {m['dim']}, changed {m['old']} -> {m['new']}",
        f"pass {m['name']} in one memory layout, such as {m['name']}.contiguous()",
    )


def _dtype(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"dtype of {m['name']} changed {m['old']} -> {m['new']}",
        f"each dtype has a graph of its own: convert {m['name']} before the call",
    )


def _rank(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"{m['name']} had {m['old']} dims and has {m['new']}",
        f"each number of dims has a graph of its own: reshape {m['name']} before the call",
    )


def _gradient(m: re.Match[str]) -> tuple[str, str]:
    now = "no longer requires grad" if m["old"] == "1" else "requires grad now"
    return (
        f"{m['name']} {now}",
        f"what requires grad is part of a graph: detach {m['name']}, or expect one graph for each",
    )


def _keys(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"{m['name']} is another kind of tensor: {m['old']} -> {m['new']}",
        "another device, inference_mode or a subclass of Tensor has a graph of its own",
    )


def _state(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"a global setting changed: {m['what'].strip()}",
        "each setting (grad mode, autocast, default dtype) has a graph of its own, once",
    )


def _sizes(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"{m[0].strip()} no longer holds",
        "the program, or an op in it, decides by this size (0 and 1 have graphs of their own): "
        "keep it in one range, or pad",
    )


def _training(m: re.Match[str]) -> tuple[str, str]:
    now = "evaluates" if m["old"] == "True" else "trains"
    return f"{m['what']} {now} now", "training and evaluation have a graph each, once"


def _length(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"the length of {m['what']} is no longer {m['old']}",
        "how long a list or dict is is part of a graph: pass as many each time",
    )


def _equal(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"{m['what']} is no longer {m['old']}",
        "a Python value that the program reads is a constant of its graph: keep it, or pass a "
        "number as a tensor",
    )


def _object(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"{m['what']} is another object, or of another type",
        "an object that the program reads is part of its graph: make it once, outside",
    )


def _backend(m: re.Match[str]) -> tuple[str, str]:
    return (
        "the function was compiled with another backend, mode or options before",
        "torch.compile it once, and call what that returns",
    )


def _gone(m: re.Match[str]) -> tuple[str, str]:
    return (
        f"what the graph was compiled for is gone: {m['what'].strip()}",
        "keep the module or the tensor alive as long as the compiled function",
    )


def _aliases(m: re.Match[str]) -> tuple[str, str]:
    return (
        "two arguments are one tensor now, or no longer are",
        "which arguments are the same tensor is part of a graph: pass a copy",
    )


RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], tuple[str, str]]], ...] = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (TENSOR + r"size mismatch at index (?P<dim>\d+)" + NUMBERS, _size),
        (TENSOR + r"stride mismatch at index (?P<dim>\d+)" + NUMBERS, _stride),
        (TENSOR + "dtype mismatch" + NUMBERS, _dtype),
        (TENSOR + "rank mismatch" + NUMBERS, _rank),
        (TENSOR + r"requires_grad mismatch\. expected requires_grad=(?P<old>\d)", _gradient),
        (TENSOR + "(?:dispatch key set|device index|device) mismatch" + NUMBERS, _keys),
        (r"GLOBAL_STATE changed:(?P<what>.*)", _state),
        (r".*\.(?:size|stride)\(\).*", _sizes),
        (r"(?P<what>.+?)\.training == (?P<old>True|False)", _training),
        (r"len\((?P<what>.+?)\) == (?P<old>\d+)", _length),
        (r"BACKEND_MATCH", _backend),
        (r"Cache line invalidated because (?P<what>.*)", _gone),
        (r"Duplicate tensor|.+ is (?!None\b|True\b|False\b|\d)", _aliases),
        (r"___check_(?:type_id|obj_id)\((?P<what>[^,]+),.*", _object),
        (r"(?P<what>[^=<>!]+?) (?:==|is) (?P<old>.+)", _equal),
    )
)


def in_words(guard: str) -> tuple[str, str]:
    """(What had changed, what to do about it) of a guard that failed; of one that is not known,
    Dynamo's own words."""
    plain = re.sub(r"\b[LG]\[['\"](\w+)['\"]\]", r"\1", guard)
    plain = re.sub(r"\._(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]", r".\1", plain)
    plain = re.sub(r"\bargs\[(\d+)\]", r"argument \1", plain)
    for pattern, words in RULES:
        found = pattern.match(plain)
        if found is not None:
            return words(found)
    return f"this no longer holds: {plain}", 'TORCH_LOGS="recompiles" tells more'


# graph breaks ------------------------------------------------------------------------------------

JUMP = re.compile(r"generic_jump\b")


class Breaks:
    """The graph breaks of a stretch of time. ``look`` before Dynamo is reset, which forgets."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []  # (why, line)
        self.last = next(reversed(private.graph_breaks()), None)

    def look(self) -> list[tuple[str, str]]:
        """Those that are new."""
        found = private.graph_breaks(self.last)
        self.last = found[-1] if found else self.last
        new = [(_why(str(b.reason)), _place(b.user_stack)) for b in found]
        self.found += new
        return new


def _place(stack: Sequence[Any]) -> str:
    return line_of(stack[-1].filename, stack[-1].lineno) if stack else ""


def _why(reason: str) -> str:
    if JUMP.match(reason):
        return (
            "Data-dependent branching: the program asks for a tensor's value, as `if x.sum() > 0`"
        )
    return reason


def tell(breaks: Iterable[tuple[str, str]]) -> None:
    for why, line in breaks:
        log.info("graph break: %s  %s", " ".join(why.split("\n  Developer")[0].split()), line)


class Watch:
    """torch's own seconds and graph breaks of a stretch of time.

    ``breaks``: why -> how often; ``lines``: why -> the user's lines; ``gave_up``: how many
    functions run as they are from now on, for they were compiled too often.
    """

    DYNAMO, COMPILER = "_compile.compile_inner", "OutputGraph.call_user_compiler"

    def __enter__(self) -> Watch:
        self._before, self._counted = self._times(), self._counts()
        self.at = Breaks()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._times()
        self.spent = {k: after[k] - self._before.get(k, 0.0) for k in after}
        self.at.look()
        self.breaks = dict(Counter(why for why, _ in self.at.found))
        lines: dict[str, dict[str, None]] = {}
        for why, line in self.at.found:
            lines.setdefault(why, {})[line] = None
        self.lines = {why: tuple(filter(None, found)) for why, found in lines.items()}
        kinds = self._counts()
        for why, times in (kinds["graph_break"] - self._counted["graph_break"]).items():
            self.breaks.setdefault(why, times)  # functions of which no graph came
        given_up = kinds["unimplemented"] - self._counted["unimplemented"]
        self.gave_up = sum(n for why, n in given_up.items() if why.startswith(LIMIT))

    def seconds(self, ours: float) -> dict[str, float]:
        """By stage, as far as torch counts them; ``ours`` is spent inside AOTAutograd's."""
        whole, inner = self.spent.get(self.DYNAMO), self.spent.get(self.COMPILER)
        if whole is None or inner is None:
            return {}
        return {"Dynamo": whole - inner, "AOTAutograd": max(inner - ours, 0.0)}

    def _times(self) -> dict[str, float]:
        known = getattr(torch._dynamo.utils, "compilation_time_metrics", {})
        return {k: sum(known[k]) for k in (self.DYNAMO, self.COMPILER) if k in known}

    def _counts(self) -> dict[str, Counter[str]]:
        counters = torch._dynamo.utils.counters
        return {kind: Counter(counters[kind]) for kind in ("graph_break", "unimplemented")}
