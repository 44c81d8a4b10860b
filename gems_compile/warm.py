"""Warm starts: whether torch's cache of whole graphs is used, and under which key."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .config import Config, cache_bytes, cache_dir, vendor, why_unsafe
from .kernels import load_ops
from .kernels.target import current_target
from .late import Boxed, Late
from .lowering import cublas, native, whole_graphs
from .lowering.binaries import Binaries
from .lowering.decompose import added_rules
from .lowering.load import binaries, library_digest
from .lowering.options import Options
from .lowering.report import Report
from .lowering.rewrite import RewriteLog
from .lowering.saved import Saved, kernel_keys
from .registered import digests

log = logging.getLogger(__name__)

_told: set[str] = set()


class Graph(whole_graphs.Kept):
    """A compiled graph of ours in torch's cache, which knows it by this class's name."""

    def revive(self) -> Boxed:
        lookup = whole_graphs.current_lookup()
        return lookup.revive(self) if lookup is not None else _alone(self)

    def kernels(self) -> Binaries | None:
        target = current_target(vendor())
        if not self.text or target is None or not target.backend:  # as the interpreter
            return self.carried
        options = Options(target=target, cache_dir=cache_dir())
        return binaries(kernel_keys(self.text), options, self.carried)


def _alone(graph: Graph) -> Boxed:
    """A graph from a file, with no compile around it: see ``torch.compile(...).aot_compile``."""
    target = current_target(vendor())
    if target is None:
        raise RuntimeError("there is no device here for what was compiled")
    load_ops()
    importlib.import_module("gems_compile.lowering.llm_losses")  # all ops that a graph may call
    if target.backend == "cuda":
        native.start(cache_dir())
    options = Options(target=target, cache_dir=cache_dir(), cache_bytes=cache_bytes())
    saved = Saved(graph.text, options, Report("file"), graph.carried)
    return Late(saved.load).boxed(graph)


def why_off(config: Config) -> str | None:
    """Why graphs are neither looked up nor kept."""
    if not config.cache:
        return "the option cache is off"
    if config.verify:
        return "verify asks for the graphs that kernels are made from"
    if config.dump is not None:
        return "a dump shows every stage of a compile"
    return whole_graphs.why_off() or _why_not_there(whole_graphs.folder())


def _why_not_there(folder: str | None) -> str | None:
    """What torch reads from its folder it runs, so the rules of our own cache hold for it."""
    why = None if folder is None else why_unsafe(folder)
    if why is None:
        return None
    why = f"torch's cache directory {folder} is not used: {why}"
    if why not in _told:
        _told.add(why)
        log.warning("%s", why)
    return why


def tag(
    config: Config, options: Options, inputs: Sequence[Any], rewrites: RewriteLog | None = None
) -> str:
    """A digest of what decides about a graph's code, beyond what torch puts into its keys: the
    program, what it is called with, torch's version and settings. ``rewrites``: what was done to
    the program; a user's own have another digest when their functions change."""
    facts = {
        "sources": sources_digest(),
        "kernels": library_digest(),
        "decompositions": added_rules(),
        "versions": [sys.version_info[:2], torch.__version__, torch.version.git_version],
        "options": repr(replace(options, cache_dir=None, cache_bytes=0, threads=None)),
        "rewrites": config.rewrites,
        "users": [] if rewrites is None else digests(rewrites),
        "tf32": torch.backends.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cublas": cublas.why_not(torch.device("cuda")),
        "ranges": whole_graphs.symbol_ranges(inputs),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@functools.cache
def sources_digest() -> str:
    """A digest of this package's own files but its kernels, and its version."""
    from . import __version__

    digest = hashlib.sha256(__version__.encode())
    (own,) = sys.modules[__package__].__path__
    (lowering,) = sys.modules[f"{__package__}.lowering"].__path__
    for folder in (own, os.path.join(own, "calls"), os.path.join(own, "insight"), lowering):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".py"):
                digest.update(name.encode())
                with open(os.path.join(folder, name), "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()
