"""gems-compile: make PyTorch models fast with one line, ``torch.compile(model, backend="gems")``.

Importing this package imports neither torch nor Triton, starts no device and writes nothing; each
name below is loaded when it is first used.

    gems          the backend itself, as ``torch.compile(backend=gems_compile.gems)`` takes it
    explain       which nodes of a function fuse, which run as ATen, and why
    dump          every stage of the compiles in a ``with`` block, as files
    reports       what the compiles of this process did
    enable        put the same kernels behind eager PyTorch; ``disable`` and ``use_gems`` with it
    enabled_ops   the ops that ``enable`` has replaced
    ops           each declared op as a function: ``gems_compile.ops.gelu(x)``
    pointwise     a decorator: a Triton function on tiles becomes an op that fuses
    rewrite       a decorator: a function stands for a chain of calls wherever that is compiled
    llm           the ops of language models: ``gems_compile.llm.rms_norm(x, weight)``
    modules       the same as modules: ``gems_compile.modules.RMSNorm(4096)``
    Config        the settings, see docs/options.md
    vendor_name   the active target: "nvidia", "amd", "interpreter", a plug-in's name or "none"
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import llm, modules
    from .authoring import pointwise
    from .backend import gems, reports
    from .config import Config
    from .dumping import dump
    from .eager import disable, enable, enabled_ops, ops, use_gems
    from .explain import explain
    from .rewriting import rewrite

    __version__: str
    vendor_name: str

__all__ = [
    "Config",
    "__version__",
    "disable",
    "dump",
    "enable",
    "enabled_ops",
    "explain",
    "gems",
    "llm",
    "modules",
    "ops",
    "pointwise",
    "reports",
    "rewrite",
    "use_gems",
    "vendor_name",
]

_HOME = {
    "Config": "config",
    "disable": "eager",
    "dump": "dumping",
    "enable": "eager",
    "enabled_ops": "eager",
    "explain": "explain",
    "gems": "backend",
    "ops": "eager",
    "pointwise": "authoring",
    "reports": "backend",
    "rewrite": "rewriting",
    "use_gems": "eager",
}
#: names that are modules
_MODULES = ("llm", "modules")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name == "vendor_name":
        return _vendor_name()
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _vendor_name() -> str:
    from .config import vendor
    from .kernels.target import current_target

    target = current_target(vendor())
    return "none" if target is None else target.name


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gems-compile")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule gems_compile.explain sets it here, over the function of that name.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
