"""Eager mode: the declared ops behind PyTorch's own operators, and as functions.

``enable()`` registers a ``one_op.Handler`` for each declared overload at the target's dispatch key.
That key lies below autograd, autocast and functorch, which therefore work as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .calls.aten_kernel import CALLED_WITH_NUMBERS_ALONE, companions
from .calls.attention import ATTENTION
from .calls.counting import SIZED
from .calls.forms import Form, forms_of
from .calls.lists import foreach
from .calls.one_call import aten_name
from .calls.one_op import Handler
from .calls.optimizers import optimizers
from .calls.worth import on_unasked
from .config import vendor
from .errors import UnknownOp, nearest
from .kernels import load_ops
from .kernels.composed import COMPOSED, UPDATING
from .kernels.draws import DRAWS
from .kernels.factories import FACTORIES
from .kernels.op import OPS, Op
from .kernels.target import Target, current_target
from .lowering.overload import find_overload
from .selection import Names, PathLike, Record, Selection, selection

log = logging.getLogger(__name__)


# what a person calls -----------------------------------------------------------------------------


def enable(
    only: Names = None,
    exclude: Names = None,
    record: Record = None,
    *,
    all: bool = False,
    config: PathLike | None = None,
) -> None:
    """Let our kernels serve PyTorch's eager ops, in the whole process, until ``disable()``.

    only:    names as ATen spells them: ``"softmax"``, ``"add"`` (all its overloads),
             ``"add.Tensor"``; None is the target's default (on a GPU: see ``worth``)
    exclude: names taken away from that
    record:  a path or a function: which ops were replaced, each named at its first call; a file
             gets the number of calls at the end
    all:     serve every overload that has a kernel, whether that measured faster or not
    config:  a TOML or YAML file that holds some of these arguments, for those not given here
    Raises:  UnknownOp for a name that is not declared, with the nearest ones
             OptionError for arguments that contradict each other, or a mistake in the file
    A second call replaces the first one's selection.
    """
    asked = selection("enable", only, exclude, record, all, config)
    layer = _Layer(_select(asked, "enable"), asked.asked, asked.record)
    with _state.lock:
        old, _state.base = _state.base, layer
        _state.apply()
    if old is not None:
        old.close()


def disable() -> None:
    """Undo ``enable()``: ATen's kernels are back. Blocks of ``use_gems`` that are open stay so."""
    with _state.lock:
        old, _state.base = _state.base, None
        _state.apply()
    if old is not None:
        old.close()


class use_gems(contextlib.ContextDecorator):
    """``enable()`` for a block: ``with use_gems(exclude=["add"]): ...``; a decorator too.

    Inside, the innermost block's selection counts, instead of ``enable()``'s. Registration is the
    process's, so that backward passes (which run in other threads) are served; blocks open in
    several threads at once add up.
    """

    def __init__(
        self,
        only: Names = None,
        exclude: Names = None,
        record: Record = None,
        *,
        all: bool = False,
        config: PathLike | None = None,
    ) -> None:
        asked = selection("use_gems", only, exclude, record, all, config)
        self._names, self._asked = _select(asked, "use_gems"), asked.asked
        self._record = asked.record
        self._open: list[tuple[int, _Layer]] = []

    def __enter__(self) -> use_gems:
        entered = (threading.get_ident(), _Layer(self._names, self._asked, self._record))
        with _state.lock:
            self._open.append(entered)
            _state.blocks.append(entered)
            _state.apply()
        return self

    def __exit__(self, *error: object) -> None:
        me = threading.get_ident()
        with _state.lock:
            mine = [e for e in self._open if e[0] == me] or self._open
            entered = mine[-1]
            self._open.remove(entered)
            _state.blocks.remove(entered)
            _state.apply()
        entered[1].close()


def enabled_ops() -> tuple[str, ...]:
    """The overloads that are replaced now, as ATen spells them: ``("add.Tensor", "gelu", ...)``."""
    with _state.lock:
        return tuple(sorted(aten_name(_overloads()[name]) for name in _state.registered))


def stats() -> dict[str, dict[str, int]]:
    """Per overload that was ever called: ``ours`` and ``native`` calls, ``compiled`` variants."""
    out = {}
    for handler in list(_state.handlers.values()):
        row = handler.counts()
        if row["ours"] or row["native"]:
            out[handler.name] = row
    return out


class Ops:
    """``ops.gelu(x, approximate="tanh")``: one declared op, arguments as in its ATen schema.

    The op runs through the dispatcher, so autograd differentiates it; where it has no kernel for
    the call, ATen's runs.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            function = _function(name)
        except UnknownOp as error:
            raise AttributeError(str(error)) from None
        setattr(self, name, function)
        return function

    def __dir__(self) -> list[str]:
        return sorted(n for n in _by_name() if "." not in n)

    def __repr__(self) -> str:
        return f"<{len(dir(self))} ops>"


ops = Ops()


# names -------------------------------------------------------------------------------------------


@functools.cache
def _declared() -> dict[str, torch._ops.OpOverload]:
    """Each ATen overload that is declared, or that declared ones make up, and that this torch has:
    by its name as torch prints it."""
    load_ops()
    found = {}
    every = (
        *OPS,
        *COMPOSED,
        *map(str, SIZED),
        *map(str, ATTENTION),
        *FACTORIES,
        *DRAWS,
        *foreach(),
    )
    for name in dict.fromkeys(every):
        if not name.startswith("aten."):  # nobody calls ours or prims' in eager mode
            continue
        overload = find_overload(name)
        if overload is None:
            log.info("%s is skipped: torch %s has no such overload", name, torch.__version__)
            continue
        found[name] = overload
    return found


@functools.cache
def _forms() -> dict[str, Form]:
    """The in-place and out= forms of those, by their names as torch prints them."""
    declared = _declared()
    found = [form for overload in declared.values() for form in forms_of(overload)]
    found += optimizers()
    return {str(form.overload): form for form in found if str(form.overload) not in declared}


@functools.cache
def _overloads() -> dict[str, torch._ops.OpOverload]:
    """All that can be replaced, or asked for by name."""
    return _declared() | {name: form.overload for name, form in _forms().items()}


def _op(name: str) -> Op | None:
    """The declaration behind an overload; None of what several make up."""
    form = _forms().get(name)
    return OPS.get(name if form is None else str(form.functional))


@functools.cache
def _by_name() -> dict[str, tuple[str, ...]]:
    """What a person may write -> the declared overloads it means.

    ``add.Tensor``, ``aten.add.Tensor``, ``aten::add.Tensor``: one overload; ``add``: all of that
    ATen name; ``softmax``: our name of an op, where ATen has no declared op of that name.
    """
    table: dict[str, list[str]] = {}
    for name in _overloads():
        _, base, overload = name.split(".")
        for spelled in (f"{base}.{overload}", base):
            for prefix in ("", "aten.", "aten::"):
                table.setdefault(prefix + spelled, []).append(name)
    bases = set(table)
    for name in _overloads():
        op = _op(name)
        if op is not None and op.name not in bases:
            table.setdefault(op.name, []).append(name)
    return {spelled: tuple(names) for spelled, names in table.items()}


def _names(given: frozenset[str], where: str) -> set[str]:
    out: set[str] = set()
    for name in given:
        if name not in _by_name():
            close = nearest(name, [n for n in _by_name() if not n.startswith("aten")], at_most=3)
            raise UnknownOp(f"{where}: no op named {name!r} is declared{close}")
        out.update(_by_name()[name])
    return out


def _select(asked: Selection, where: str) -> frozenset[str]:
    """The overloads, by their names in OPS, that are asked for on this target."""
    return _chosen(asked.only, asked.exclude, asked.all, current_target(vendor()), where)


@functools.lru_cache(maxsize=256)
def _chosen(
    only: frozenset[str] | None,
    exclude: frozenset[str],
    everything: bool,
    target: Target | None,
    where: str,
) -> frozenset[str]:
    """Found once for each selection; so each reason why an op is not replaced is logged once."""
    chosen = _names(only or frozenset(), f"{where}(only=...)")
    dropped = _names(exclude, f"{where}(exclude=...)")
    if target is None:
        log.warning("no GPU and no interpreter (TRITON_INTERPRET=1): nothing is replaced")
        return frozenset()
    if only is None:
        chosen = {n for n in _overloads() if everything or _on_by_default(n, target)}
    keep = set()
    for name in chosen - dropped:
        why = why_not_replaced(name, target)
        if why is None:
            keep.add(name)
        else:
            log.log(logging.INFO if only is None else logging.WARNING, "%s: %s", name, why)
    return frozenset(keep)


def _on_by_default(name: str, target: Target) -> bool:
    if target.name == "interpreter":
        return True
    return on_unasked(aten_name(_overloads()[name]), target)


@functools.cache
def why_not_replaced(name: str, target: Target) -> str | None:
    """Why a declared overload keeps ATen's kernel on this target, or None."""
    overload = _overloads()[name]
    has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, overload.name())
    schema = overload._schema
    aliased = any(a.alias_info is not None for a in schema.returns)
    if target.dispatch_key == "CUDA" and name in CALLED_WITH_NUMBERS_ALONE:
        return "ATen calls it with a number on the device, which no kernel in Python is given"
    if name not in _forms() and name not in UPDATING and (schema.is_mutable or aliased):
        return "it writes or returns an operand"
    if has("CompositeImplicitAutograd") and not has(target.dispatch_key):
        # ours at the device key would hide the decomposition that autograd differentiates
        return f"it has no {target.dispatch_key} kernel: autograd goes through its decomposition"
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(
        overload.name(), target.dispatch_key
    ):
        return f"ATen has no {target.dispatch_key} kernel to fall back to"
    return None


# what is registered ------------------------------------------------------------------------------


class _Layer:
    """One ``enable()`` or one entered block: its overloads, and its record.

    ``asked``: whether they were named, and so are served wherever there is a kernel.
    """

    def __init__(self, names: frozenset[str], asked: bool, record: Record) -> None:
        self.names, self.asked = names, asked
        self.record = None if record is None else _Record(record)

    def close(self) -> None:
        if self.record is not None:
            self.record.close()


class _Record:
    """Counts the calls of each replaced op, and tells the first one of each."""

    def __init__(self, to: Any) -> None:
        self.tell = to if callable(to) else None
        self.path = None if callable(to) else os.fspath(to)
        self.counts: Counter[str] = Counter()
        if self.path is not None:
            with open(self.path, "w"):  # a path that cannot be written is an error now
                pass
            atexit.register(self.close)

    def saw(self, name: str) -> None:
        self.counts[name] += 1
        if self.counts[name] > 1:
            return
        if self.tell is not None:
            self.tell(name)
        else:
            assert self.path is not None  # there is one or the other
            with open(self.path, "a") as f:
                f.write(f"{name}\n")

    def close(self) -> None:
        if self.path is None:
            return
        atexit.unregister(self.close)
        with open(self.path, "w") as f:
            f.writelines(f"{name} {count}\n" for name, count in self.counts.most_common())


class _State:
    """The process's registrations, kept equal to what the open layers ask for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.base: _Layer | None = None
        self.blocks: list[tuple[int, _Layer]] = []  # (thread, layer), in order of entry
        self.single: Counter[str] = Counter()  # overloads that calls of ``ops`` need now
        self.handlers: dict[str, Handler] = {}
        self.registered: dict[str, torch.library.Library] = {}
        self.applied: object = None  # what ``apply`` has seen to; None: not known
        self.watched: frozenset[str] = frozenset()  # those whose calls a record counts
        self.picky: frozenset[str] = frozenset()  # those of which only faster calls are served

    def layers(self) -> list[_Layer]:
        """The layers that count: each thread's innermost block, or ``enable()``'s without any."""
        if self.blocks:
            return list(dict(self.blocks).values())
        return [] if self.base is None else [self.base]

    def apply(self) -> None:
        """Look at what has changed alone: blocks are entered often, and there are 800 ops."""
        layers = self.layers()
        records = [(layer.names, layer.record) for layer in layers if layer.record is not None]
        asks = frozenset((layer.names, layer.asked) for layer in layers)
        named = [layer.names for layer in layers if layer.asked]
        single = frozenset(n for n in self.single if not any(n in names for names in named))
        now = asks, tuple(record for _, record in records), single
        if now == self.applied:
            return
        self.applied = None
        wanted = single.union(*(layer.names for layer in layers))
        wanted |= self._companions(wanted)
        asked = single.union(*named)
        for name in self.registered.keys() - wanted:
            self.handlers[name].unregister(self.registered.pop(name))
        fresh = wanted - self.registered.keys()
        if fresh:
            with warnings.catch_warnings():
                # torch warns of an overridden kernel; this one knows what it does
                warnings.filterwarnings("ignore", message="(?s).*Overriding a previously")
                for name in fresh:
                    self.registered[name] = self.handler(name).register()
        watched: frozenset[str] = frozenset().union(*(names for names, _ in records))
        for name in wanted & (fresh | watched | self.watched):
            self.handlers[name].watchers = tuple(r for names, r in records if name in names)
        picky = wanted - asked if self._is_measured() else frozenset()
        for name in wanted & (fresh | picky ^ self.picky):
            self.handlers[name].be_picky(name in picky)
        self.watched, self.picky, self.applied = watched, picky, now

    def _companions(self, wanted: frozenset[str]) -> frozenset[str]:
        target = current_target(vendor())
        return frozenset() if target is None else companions(wanted, target.dispatch_key)

    def _is_measured(self) -> bool:
        """Whether there is a default to be picky by: the interpreter serves whatever it can."""
        target = current_target(vendor())
        return target is not None and target.name != "interpreter"

    def handler(self, name: str) -> Handler:
        if name not in self.handlers:
            target = current_target(vendor())
            assert target is not None, "layers name no op without a target"
            self.handlers[name] = Handler(_overloads()[name], target, _forms().get(name))
        return self.handlers[name]


_state = _State()


# one op as a function ----------------------------------------------------------------------------


def _function(name: str) -> Callable[..., Any]:
    names = _names(frozenset([name]), "ops")
    packets = {_overloads()[n].overloadpacket for n in names}
    if len(packets) > 1:
        spelled = ", ".join(sorted(aten_name(_overloads()[n]) for n in names))
        raise UnknownOp(f"ops: {name!r} names several ops; write one of {spelled}")
    (call,) = {_overloads()[n] for n in names} if len(names) == 1 else packets

    def function(*args: Any, **kwargs: Any) -> Any:
        with _serving(_replaceable(frozenset(names))):
            return call(*args, **kwargs)

    function.__name__ = function.__qualname__ = name
    schemas = "\n".join(str(_overloads()[n]._schema) for n in sorted(names))
    op = _op(min(names))
    function.__doc__ = schemas if op is None else f"{op.doc}\n\n{schemas}"
    return function


@functools.cache
def _replaceable(names: frozenset[str]) -> frozenset[str]:
    target = current_target(vendor())
    if target is None:
        return frozenset()
    return frozenset(n for n in names if why_not_replaced(n, target) is None)


@contextlib.contextmanager
def _serving(names: frozenset[str]) -> Any:
    """Have these overloads registered during one call, beside whatever is."""
    with _state.lock:
        _state.single.update(names)
        _state.apply()
    try:
        yield
    finally:
        with _state.lock:
            _state.single = +(_state.single - Counter(names))
            _state.apply()
