"""What ``enable()`` and ``use_gems()`` are asked for, by arguments and by a file.

A TOML file holds the keyword arguments of the call; so does a YAML file, if PyYAML is installed::

    only = ["softmax", "layer_norm"]
    exclude = ["_softmax.out"]
    record = "served.txt"
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import OptionError, nearest, unknown

Names = str | Iterable[str] | None
PathLike = str | os.PathLike[str]
Record = PathLike | Callable[[str], Any] | None

KEYS = ("only", "exclude", "all", "record")
TOML, YAML = (".toml",), (".yaml", ".yml")


class Selection(NamedTuple):
    """``only`` None: the target's default, or with ``all`` whatever has a kernel."""

    only: frozenset[str] | None
    exclude: frozenset[str]
    all: bool
    record: Record

    @property
    def asked(self) -> bool:
        """Whether the ops are served wherever there is a kernel, not only where it is faster."""
        return self.all or self.only is not None


def selection(
    where: str,
    only: Names = None,
    exclude: Names = None,
    record: Record = None,
    everything: bool = False,
    config: PathLike | None = None,
) -> Selection:
    """The arguments of a call of ``where``; those left out are the file's.

    Raises: OptionError for arguments that contradict each other, and for what is wrong in the file
    """
    found = {} if config is None else read(config)
    only = found.get("only") if only is None else only
    exclude = found.get("exclude") if exclude is None else exclude
    record = found.get("record") if record is None else record
    everything = everything or found.get("all", False)
    if everything and only is not None:
        raise OptionError(
            f"{where}(all=True, only=...): all=True serves every op that has a kernel, only= those "
            "it names; give one of the two"
        )
    named = None if only is None else _set(only)
    return Selection(named, _set(exclude), everything, record)


def _set(names: Names) -> frozenset[str]:
    return frozenset([names] if isinstance(names, str) else names or ())


def read(path: PathLike) -> dict[str, Any]:
    """The arguments that a file holds, each of the type that it has in a call.

    Raises: OptionError, which names the file, for another suffix than those of TOML and YAML, for
            a file that cannot be parsed, an unknown key, a value of another type
    """
    path = Path(path)
    if path.suffix.lower() in TOML:
        found = _toml(path)
    elif path.suffix.lower() in YAML:
        found = _yaml(path)
    else:
        valid = ", ".join((*TOML, *YAML))
        raise OptionError(f"{path}: its name ends in {path.suffix!r}; valid: {valid}")
    if not isinstance(found, Mapping):
        raise OptionError(f"{path} holds a {type(found).__name__}; it should hold {_keys()}")
    for key, value in found.items():
        if key not in KEYS:
            raise OptionError(unknown(f"{path}: key", key, KEYS))
        if why := _why_wrong(key, value):
            raise OptionError(f"{path}: {key} = {value!r}: {why}")
    return dict(found)


def _keys() -> str:
    return f"some of the keys {', '.join(KEYS)}"


def _why_wrong(key: str, value: Any) -> str | None:
    if key == "all":
        if isinstance(value, bool):
            return None
        close = nearest(str(value).lower(), ("true", "false"), at_most=1)
        return f"it is true or false{close}"
    if key == "record":
        return None if isinstance(value, str) else "it is the path of a file"
    many = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return None if many or isinstance(value, str) else "it is a name of ops or a list of names"


def _toml(path: Path) -> Any:
    reader = _installed("tomllib", "tomli")  # Python 3.10 has no tomllib
    if reader is None:
        raise OptionError(
            f"{path}: Python 3.10 reads TOML with tomli, which is not installed: "
            "pip install 'gems-compile[config]'"
        )
    try:
        return reader.loads(path.read_text(encoding="utf-8"))
    except reader.TOMLDecodeError as error:
        raise OptionError(f"{path} is no TOML: {error}") from None


def _yaml(path: Path) -> Any:
    reader = _installed("yaml")
    if reader is None:
        raise OptionError(
            f"{path}: YAML is read with PyYAML, which is not installed: "
            "pip install 'gems-compile[config]', or write it as TOML"
        )
    try:
        return reader.safe_load(path.read_text(encoding="utf-8"))
    except reader.YAMLError as error:
        raise OptionError(f"{path} is no YAML: {' '.join(str(error).split())}") from None


def _installed(*modules: str) -> Any:
    """The first of these modules that there is, or None."""
    for module in modules:
        with contextlib.suppress(ImportError):
            return importlib.import_module(module)
    return None
