"""torch's AOTAutogradCache for graphs of ours: private interfaces, as in ``private.py``.

Checked on torch 2.13.0; 2.11.0 has the same by its sources. Where one is missing, ``MISSING`` says
what, and no whole graph is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from .artifacts import with_kernels
from .binaries import Binaries, from_state
from .constants import Unsaveable

log = logging.getLogger("gems_compile.lowering.whole_graphs")

MISSING: str | None = None
try:
    import torch._functorch.config as functorch_config
    from torch._functorch._aot_autograd import autograd_cache
    from torch._functorch.aot_autograd import SerializableAOTDispatchCompiler
    from torch._inductor.output_code import OutputCode

    for _owner, _name in (
        (functorch_config, "bundled_autograd_cache"),
        (functorch_config, "enable_autograd_cache"),
        (functorch_config, "force_non_lazy_backward_lowering"),
        (torch.compiler.config, "cache_key_tag"),
        (autograd_cache, "BypassAOTAutogradCache"),
        (OutputCode, "prepare_for_serialization"),
        (OutputCode, "post_compile"),
    ):
        getattr(_owner, _name)
except (ImportError, AttributeError) as missing:
    MISSING = f"this torch keeps its cache of graphs elsewhere ({missing})"
    if not TYPE_CHECKING:
        OutputCode = object

FROM_CACHE, KEPT, FRESH = "from the cache", "kept", "compiled afresh, as was asked"
NOT_KEPT = "not kept: "

Boxed = Callable[[list[Any]], Any]
#: (graph module, inputs, whose ``run`` it is) -> (what runs, what writes its text)
CompileOne = Callable[[Any, Sequence[Any], Any], tuple[Boxed, Callable[[], str]]]

_lookup: ContextVar[Lookup | None] = ContextVar("gems_lookup", default=None)


class Kept(OutputCode):
    """What AOTAutograd gets of a compiled graph, and keeps of it: a text.

    ``run`` is what it calls. ``write`` makes the text when torch saves the graph; ``revive`` (of a
    subclass, which is what a pickle names) makes it run again. ``carried`` are the compiled kernels
    that came with the text.
    """

    carried: Binaries | None = None

    def __init__(self) -> None:
        super().__init__()
        self._tell_torch()
        self.run: Boxed | None = None
        self.write: Callable[[], str] | None = None
        self.text = ""

    def _tell_torch(self) -> None:
        """What torch looks for in an instance's own attributes, which it copies to wrappers."""
        self._boxed_call = True
        self._time_taken_ns = 0  # torch does arithmetic with it
        self._fx_graph_cache_key = self._fx_graph_cache_debug_lines = None

    def __call__(self, inputs: Sequence[Any]) -> Any:
        return self.run(inputs)  # type: ignore[misc, arg-type]  # set before torch calls it

    def revive(self) -> Boxed:
        """What runs ``text``."""
        raise NotImplementedError

    def kernels(self) -> Binaries | None:
        """Those of ``text``, once they are compiled."""
        return self.carried

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """torch has read this from its cache."""
        if self.run is None:
            self.run = self.revive()
            self.carried = None  # they are in the kernel cache

    def prepare_for_serialization(self) -> None:
        """torch calls this of a copy that it will save."""
        if self.text:
            return
        lookup = _lookup.get()
        try:
            if self.write is None:
                raise Unsaveable("it was compiled too late")
            self.text = self.write()
            if lookup is not None and lookup.fresh:
                raise Unsaveable(FRESH)
        except Unsaveable as why:
            if lookup is not None:
                lookup.why = str(why)
            raise autograd_cache.BypassAOTAutogradCache(str(why)) from None

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        pass

    def __copy__(self) -> Kept:
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """With its kernels where a user saves it. While one compiles that would mean to wait."""
        state: dict[str, Any] = {"text": self.text, "digest": _digest(self.text)}
        if _lookup.get() is None:
            kernels = self.kernels()
            state["kernels"] = None if kernels is None else kernels.state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if _digest(state["text"]) != state["digest"]:
            raise ValueError("the graph in the cache is damaged")
        self.text, self.write, self.run = state["text"], None, None
        self.carried = from_state(state.get("kernels"))
        self._tell_torch()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Lookup:
    """One call of AOTAutograd: its graphs come from the cache, or are made and kept in it.

    ``revive`` makes a graph that is found run; ``tag`` is whatever else
    decides what a graph becomes. Afterwards ``said`` tells what happened. A ``fresh`` lookup finds
    and keeps nothing, and tells whether it would.
    """

    def __init__(
        self,
        kind: type[Kept],
        tag: str,
        revive: Callable[[Kept], Boxed],
        fresh: bool = False,
    ) -> None:
        self.kind, self.tag, self._revive, self.fresh = kind, tag, revive, fresh
        self.made: list[Kept] = []
        self.why = ""
        self.said = ""

    def compiler(self, compile_one: CompileOne) -> Any:
        """What AOTAutograd takes as a compiler."""

        def made(gm: Any, inputs: Sequence[Any]) -> Kept:
            graph = self.kind()
            graph.run, graph.write = compile_one(gm, inputs, graph)
            self.made.append(graph)
            return graph

        return SerializableAOTDispatchCompiler(self.kind, made)

    def revive(self, graph: Kept) -> Boxed:
        try:
            return self._revive(graph)
        except Exception as e:
            self.why = f"{e}" if isinstance(e, Unsaveable) else f"{type(e).__name__}: {e}"
            log.info("a graph in the cache is not used: %s", self.why)
            raise

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """torch looks graphs up, and keeps those that it does not find."""
        before = _counted()
        tag = f"{uuid.uuid4().hex} {self.tag}" if self.fresh else self.tag
        config: Any = torch.compiler.config
        key_of = getattr(autograd_cache, "autograd_cache_key", None)
        token = _lookup.set(self)
        try:
            with (
                functorch_config.patch(bundled_autograd_cache=True),
                config.patch(cache_key_tag=f"{config.cache_key_tag}|gems {tag}"),
                _replaced(autograd_cache, "autograd_cache_key", self._noting(key_of)),
                with_kernels(),
            ):
                yield
        finally:
            _lookup.reset(token)
            for graph in self.made:
                graph.write = None  # it holds all that was known while compiling
            after = _counted()
            self._conclude({name: after[name] - before[name] for name in after})

    def _noting(self, key_of: Any) -> Callable[..., Any]:
        """torch counts the graphs that it does not look up, and tells why in its log alone."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                with _without_inductors():
                    return key_of(*args, **kwargs)
            except Exception as e:
                self.why = f"torch: {' '.join(str(e).split())}"
                raise

        return noted

    def _conclude(self, counted: dict[str, int]) -> None:
        if counted["autograd_cache_hit"]:
            self.said = FROM_CACHE
        elif counted["autograd_cache_saved"]:
            self.said = KEPT
        elif self.why == FRESH:
            self.said = FRESH
        else:
            self.said = f"{NOT_KEPT}{self.why or 'torch tells no reason'}"


@contextlib.contextmanager
def _replaced(owner: Any, name: str, instead: Any) -> Iterator[None]:
    """``instead`` stands for ``owner.name`` meanwhile; nothing changes where there is none."""
    if name not in vars(owner):
        yield
        return
    known = vars(owner)[name]  # of a class, a static method as such
    setattr(owner, name, instead)
    try:
        yield
    finally:
        setattr(owner, name, known)


@contextlib.contextmanager
def _without_inductors() -> Iterator[None]:
    """Leave out of torch's key what decides about Inductor's code alone.

    To import its code generators takes 0.4 s a process, to read all files of Triton 0.3 s and its
    own 0.1 s, and cold starts would pay for it, too. The versions of both are in our tag.
    """
    from torch._inductor import codecache

    left_out: list[tuple[Any, str, Any]] = [
        (codecache, "init_backend_registration", lambda: None),
        (codecache, "custom_backend_passes", {}),
        (codecache, "custom_backend_codegen_configs", {}),
        (codecache, "torch_key", lambda: b""),
    ]
    if hasattr(codecache, "CacheBase"):
        left_out.append((codecache.CacheBase, "get_system", dict))
    with contextlib.ExitStack() as stack:
        for owner, name, instead in left_out:
            stack.enter_context(_replaced(owner, name, instead))
        yield


def _counted() -> dict[str, int]:
    found = torch._dynamo.utils.counters["aot_autograd"]
    return {name: found[name] for name in ("autograd_cache_hit", "autograd_cache_saved")}


def current_lookup() -> Lookup | None:
    return _lookup.get()


def why_off() -> str | None:
    """Why torch's own settings leave the cache alone."""
    if MISSING is not None:
        return MISSING
    if getattr(torch.compiler.config, "force_disable_caches", False):
        return "torch.compiler.config.force_disable_caches is set"
    if not functorch_config.enable_autograd_cache:
        return "torch._functorch.config.enable_autograd_cache is not set"
    return None


def folder() -> str | None:
    """Where torch keeps graphs; None where it does not say."""
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:
        return None
    return os.path.abspath(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())


def symbol_ranges(inputs: Sequence[Any]) -> list[tuple[str, str]]:
    """What Dynamo knows of the sizes that are symbols, and guards: a graph may rely on it."""
    for value in inputs:
        for number in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(number, torch.SymInt):
                ranges = number.node.shape_env.var_to_range
                return sorted((str(symbol), str(known)) for symbol, known in ranges.items())
    return []
