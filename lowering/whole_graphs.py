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

_lookup: ContextVar[Lookup | None] = ContextVar("gems_lookup", default=None)


class Kept(OutputCode):
    """What AOTAutograd gets of a compiled graph, and keeps of it: a text.

    ``write`` makes the text when torch saves the graph; ``revive`` (of a subclass, which is what a
    pickle names) makes it run again.
    """

    def __init__(self, run: Callable[[list[Any]], Any], write: Callable[[], str]) -> None:
        super().__init__()
        self._tell_torch()
        self.run: Any = run
        self.write: Callable[[], str] | None = write
        self.text = ""

    def _tell_torch(self) -> None:
        """What torch looks for in an instance's own attributes, which it copies to wrappers."""
        self._boxed_call = True
        self._time_taken_ns = 0  # torch does arithmetic with it
        self._fx_graph_cache_key = self._fx_graph_cache_debug_lines = None

    def __call__(self, inputs: Sequence[Any]) -> Any:
        return self.run(inputs)

    def revive(self, text: str) -> Callable[[list[Any]], Any]:
        raise NotImplementedError

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """torch has read this from its cache."""
        if self.run is None:
            self.run = self.revive(self.text)

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

    def __getstate__(self) -> dict[str, str]:
        return {"text": self.text, "digest": _digest(self.text)}

    def __setstate__(self, state: dict[str, str]) -> None:
        if _digest(state["text"]) != state["digest"]:
            raise ValueError("the graph in the cache is damaged")
        self.text, self.write, self.run = state["text"], None, None
        self._tell_torch()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Lookup:
    """One call of AOTAutograd: its graphs come from the cache, or are made and kept in it.

    ``revive`` turns the text of a graph that is found into what runs; ``tag`` is whatever else
    decides what a graph becomes. Afterwards ``said`` tells what happened. A ``fresh`` lookup finds
    and keeps nothing, and tells whether it would.
    """

    def __init__(
        self,
        kind: type[Kept],
        tag: str,
        revive: Callable[[str], Callable[[list[Any]], Any]],
        fresh: bool = False,
    ) -> None:
        self.kind, self.tag, self._revive, self.fresh = kind, tag, revive, fresh
        self.made: list[Kept] = []
        self.why = ""
        self.said = ""

    def compiler(
        self,
        compile_one: Callable[
            [Any, Sequence[Any]], tuple[Callable[[list[Any]], Any], Callable[[], str]]
        ],
    ) -> Any:
        """``compile_one`` makes what runs, and what writes its text."""

        def made(gm: Any, inputs: Sequence[Any]) -> Kept:
            graph = self.kind(*compile_one(gm, inputs))
            self.made.append(graph)
            return graph

        return SerializableAOTDispatchCompiler(self.kind, made)

    def revive(self, text: str) -> Callable[[list[Any]], Any]:
        try:
            return self._revive(text)
        except Exception as e:
            self.why = f"{e}" if isinstance(e, Unsaveable) else f"{type(e).__name__}: {e}"
            log.info("a graph in the cache is not used: %s", self.why)
            raise

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """torch looks graphs up, and keeps those that it does not find."""
        key_of = getattr(autograd_cache, "autograd_cache_key", None)
        before = _counted()
        tag = f"{uuid.uuid4().hex} {self.tag}" if self.fresh else self.tag
        token = _lookup.set(self)
        if key_of is not None:
            autograd_cache.autograd_cache_key = self._noting(key_of)
        try:
            with (
                functorch_config.patch(bundled_autograd_cache=True),
                torch.compiler.config.patch(
                    cache_key_tag=f"{torch.compiler.config.cache_key_tag}|gems {tag}"
                ),
            ):
                yield
        finally:
            if key_of is not None:
                autograd_cache.autograd_cache_key = key_of
            _lookup.reset(token)
            for graph in self.made:
                graph.write = None  # it holds all that was known while compiling
            after = _counted()
            self._conclude({name: after[name] - before[name] for name in after})

    def _noting(self, key_of: Callable[..., Any]) -> Callable[..., Any]:
        """torch counts the graphs that it does not look up, and tells why in its log alone."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
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
