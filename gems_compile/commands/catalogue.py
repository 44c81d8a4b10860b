"""``python -m gems_compile ops``: what eager mode can serve, by which kernel, how fast, and why it
is on by default or not. ``--markdown`` is ``docs/ops.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..calls.worth import STANDARD, Measured, table_of
from ..errors import UnknownOp
from ..kernels.op import ALL, FLOATS, INTS, NUMBERS, OPS
from ..kernels.target import Target
from ..tables import Table, show

#: kinds of those that are no declared op's
COMPOSED, FORM = "composed", " form"
DTYPES = {FLOATS: "floats", INTS: "ints", NUMBERS: "numbers", ALL: "all"}


@dataclass(frozen=True)
class Entry:
    """One overload, as ATen spells it.

    kind:    pointwise, reduction, composite, composed; of what writes another's result,
             "in-place form" or "out= form", of the overload ``form_of``
    kernel:  the file and name of the declaration; of a composed op, what it is made by
    dtypes:  what the kernel takes; of a composed op, whatever those that make it up take
    ratios:  operand's shape -> time of ATen's call over ours, on ``measured_on``
    least:   elements of its largest operand from which calls are served by default; None: never
    default: whether ``enable()`` serves any of its calls on ``target``, and ``why``
    """

    name: str
    kind: str
    form_of: str | None
    kernel: str
    dtypes: tuple[str, ...]
    target: str
    measured_on: str
    ratios: dict[str, float]
    least: int | None
    default: bool
    why: str


def main(as_json: bool, as_markdown: bool, only: Sequence[str]) -> int:
    if as_markdown:
        print(markdown(), end="")
        return 0
    try:
        found = entries(only)
    except UnknownOp as error:
        print(error, file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps([asdict(entry) for entry in found], indent=1))
        return 0
    rows: list[Sequence[Any]] = [
        (e.name, e.kind, e.kernel, spelled(e.dtypes), _range(e.ratios), _on(e.default), e.why)
        for e in found
    ]
    columns = ("overload", "kind", "kernel", "dtypes", "speed", "default", "why")
    show([Table(f"On {found[0].target}", columns, rows), _summary(found)])
    return 0


def _summary(found: Sequence[Entry]) -> str:
    on = sum(entry.default for entry in found)
    return (
        f"{len(found)} overloads, {on} of them on by default. Speed: of ours, ATen's being 1, "
        f"measured on {found[0].measured_on}; -: not measured."
    )


def entries(only: Iterable[str] = ()) -> list[Entry]:
    """Those that eager mode can serve, by name; of the names ``only``, if there are any.

    Raises: UnknownOp for a name that ``enable(only=...)`` does not know either
    """
    from .. import eager
    from ..config import vendor
    from ..kernels.target import current_target

    target = current_target(vendor())
    wanted = eager._names(frozenset(only), "ops --only") if only else set(eager._overloads())
    found = [_entry(name, target) for name in wanted]
    return sorted(found, key=lambda entry: (entry.name.lower(), entry.name))


def _entry(name: str, target: Target | None) -> Entry:
    from .. import eager
    from ..calls.one_call import aten_name

    spelt, form, op = aten_name(eager._overloads()[name]), eager._forms().get(name), eager._op(name)
    table = table_of(STANDARD if target is None else target.label)
    measured = table.ops.get(spelt, Measured(None))
    default, why = _default(name, target, measured)
    return Entry(
        name=spelt,
        kind=form.kind + FORM if form is not None else op.kind if op is not None else COMPOSED,
        form_of=aten_name(form.functional) if form is not None else None,
        kernel=kernel_of(name if form is None else str(form.functional)),
        dtypes=op.dtypes if op is not None else (),
        target="no target" if target is None else target.label,
        measured_on=f"{table.measured} ({table.target})",
        ratios=dict(measured.ratios),
        least=measured.least,
        default=default,
        why=why,
    )


def _default(name: str, target: Target | None, measured: Measured) -> tuple[bool, str]:
    """Whether ``enable()`` serves the overload, and why."""
    from .. import eager

    if target is None:
        return False, "there is no GPU"
    if why := eager.why_not_replaced(name, target):
        return False, why
    if target.name == "interpreter":
        return True, "the interpreter: all are"
    if measured.gains:
        return True, served(measured)
    return False, "ATen's is faster" if measured.ratios else "not measured"


def served(measured: Measured) -> str:
    """Which calls are ours by default, in a few words."""
    least, longest, across = measured.least, measured.longest, measured.least_across
    texts = []
    if least is not None:
        texts.append(f"from {power(least)} elements" if least else "always")
        texts += [f"rows of at most {power(longest)}"] if longest is not None else []
    if across is not None:
        texts.append(f"across rows from {power(across)}")
    return ", ".join(texts)


def _range(ratios: Mapping[str, float]) -> str:
    """ "0.7 to 2.4"."""
    if not ratios:
        return "-"
    low, high = min(ratios.values()), max(ratios.values())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _on(default: bool) -> str:
    return "on" if default else "off"


def power(count: int) -> str:
    """2^24 for 16777216."""
    exact = count >= 1024 and count.bit_count() == 1
    return f"2^{count.bit_length() - 1}" if exact else str(count)


def kernel_of(name: str) -> str:
    """``activation.gelu``: file of ``kernels/`` and name of a declaration."""
    op = OPS.get(name)
    if op is None:
        return "rules"
    body = getattr(op.body, "fn", op.body)  # a jit function wraps the Python one
    return f"{body.__module__.rpartition('.')[2]}.{op.name}"


def spelled(dtypes: tuple[str, ...]) -> str:
    return DTYPES.get(dtypes, ", ".join(dtypes)) or "-"


# docs/ops.md --------------------------------------------------------------------------------------

HEAD = """# Ops of eager mode

What `gems_compile.enable(all=True)` serves: {overloads} overloads of torch {torch}. Written by
`python -m gems_compile ops --markdown > docs/ops.md`. `python -m gems_compile ops` tells of each
overload what is on by default on your device, and why.

- *forms*: which of the overloads have an in-place (`add_.Tensor`) or `out=` form (`add.out`), whose
  result the same kernel stores in its place.
- *kernel*: file of `kernels/` and name of the declaration. Ops without one are taken apart by
  rules of torch's or ours, and what that gives is compiled into one kernel or two
  (`kernels/composed.py`, `kernels/factories.py`, `kernels/draws.py`); of those whose results' sizes
  are data, into more, with a number read between them (`gems_compile/calls/counting.py`). Those of
  lists (`_foreach_add`) are what the op on one tensor is, a launch for many
  (`gems_compile/calls/lists.py`).
- *dtypes*: floats are {floats}; ints {ints}; numbers both; all those and bool.
- *speed*: of ours, ATen's being 1, on an {measured}:
  {how}.
- *default*: which calls a GPU serves unasked. Nothing there: those that ask for it, by `only=` or
  `all=True`.

| op | overloads | forms | kernel | dtypes | speed | default |
| --- | --- | --- | --- | --- | --- | --- |
"""


def markdown() -> str:
    """One line for each op: overloads of one name, kernel and dtypes share it."""
    import torch

    from .. import eager

    lines: dict[tuple[str, str, str], list[str]] = {}
    for name in eager._declared():
        op = OPS.get(name)
        kernel, dtypes = ("", "") if op is None else (f"`{kernel_of(name)}`", spelled(op.dtypes))
        lines.setdefault((name.split(".")[1], kernel, dtypes), []).append(name)
    table = table_of(STANDARD)
    rows = []
    for (base, kernel, dtypes), names in sorted(lines.items()):
        overloads = ", ".join(name.split(".")[2] for name in names)
        spelt = [eager.aten_name(eager._declared()[name]) for name in names]
        found = [table.ops[name] for name in spelt if name in table.ops]
        speed = "; ".join(_range(measured.ratios) for measured in found)
        default = "; ".join(served(measured) for measured in found)
        cells = (f"`{base}`", overloads, _forms(names), kernel, dtypes, speed, default)
        rows.append(f"| {' | '.join(cells)} |\n")
    head = HEAD.format(
        overloads=len(eager._overloads()),
        torch=made_with(torch.__version__),
        floats=", ".join(FLOATS),
        ints=", ".join(INTS),
        measured=table.measured,
        how=table.how,
    )
    return head + "".join(rows)


def made_with(version: str) -> str:
    """The part of torch's version that decides which overloads there are: "2.13"."""
    return ".".join(version.split(".")[:2])


def _forms(names: Sequence[str]) -> str:
    """The kinds of forms of these overloads: "in-place, out="; by overload where they differ."""
    from .. import eager

    kinds: dict[str, set[str]] = {name: set() for name in names}
    for form in eager._forms().values():
        if str(form.functional) in kinds:
            kinds[str(form.functional)].add(form.kind)
    texts = {name.split(".")[2]: ", ".join(sorted(found)) for name, found in kinds.items()}
    if len(set(texts.values())) == 1:
        return texts.popitem()[1]
    return "; ".join(f"{overload}: {text}" for overload, text in texts.items() if text)
