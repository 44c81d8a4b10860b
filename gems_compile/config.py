"""The settings: one frozen ``Config`` a compile, and the one place that reads ``GEMS_*`` variables.

A value comes from ``options=``, else (a dump's folder) from ``gems_compile.dump``, else from the
environment, else from the default. A wrong option is
an error, for it is in the program; a wrong variable is a warning, for it may be meant for another
program on the same machine.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import dumping
from .errors import OptionError, nearest, unknown
from .lowering.options import Options

log = logging.getLogger(__name__)

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
MAX_THREADS = 256
MAX_MB = 10**9 - 1
MAX_SECONDS = 3600


class _Bad(Exception):
    """A value that a parser refuses; its text says which values it takes."""


def _one_of(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise _Bad(", ".join(names) + nearest(value, names))
        return value

    return parse


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad("True, False")
    return value


def _rewrites(value: Any) -> bool | str:
    if not isinstance(value, bool) and value != "memory":
        raise _Bad("True, False, memory")
    return value


def _folder(value: Any) -> str | None:
    if value is None:
        return None
    try:
        path = os.fspath(value)
    except TypeError:
        path = ""
    if not isinstance(path, str) or not path or "\0" in path:
        raise _Bad("a folder's path, None")
    return os.path.abspath(os.path.expanduser(path))


def _workers(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_THREADS:
        raise _Bad(f"a whole number from 0 to {MAX_THREADS}, None")
    return value


def _seconds(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= MAX_SECONDS:
        raise _Bad(f"a number from 0 to {MAX_SECONDS}")
    return float(value)


PARSERS: dict[str, Callable[[Any], Any]] = {
    "numerics": _one_of("eager", "fast"),
    "rewrites": _rewrites,
    "rng": _one_of("gems", "eager"),
    "layout": _one_of("auto", "keep", "channels_last"),
    "keep_weights": _switch,
    "cudagraphs": _switch,
    "strict": _switch,
    "dump": _folder,
    "threads": _workers,
    "cache": _switch,
    "verify": _switch,
    "tune": _switch,
    "tune_seconds": _seconds,
}

#: Inductor's name of an option -> ours
SAME_AS = {"triton.cudagraphs": "cudagraphs", "max_autotune": "tune"}


@dataclass(frozen=True)
class Config:
    """What one compile depends on; hashable, and checked when made.

    numerics: "eager" rounds each 16-bit intermediate where eager rounds it; "fast" keeps float32.
    rewrites: whether known patterns are replaced by another algorithm; "memory" takes those as well
              that save memory and may take time.
    rng:      dropout's generator: "gems" is our own (saves a seed, not a mask), "eager" is ATen's.
    layout:   of convolutions: "auto" makes them channels-last where a graph gains by it, "keep"
              never, "channels_last" always.
    keep_weights: whether inference keeps the weights that it converts to channels-last.
    cudagraphs: whether what can be captured in CUDA graphs is, and replayed.
    strict:   a failure inside the compiler raises instead of running the group as ATen.
    dump:     the folder that gets every stage of every compile as files, or None.
    threads:  worker processes that compile kernels; 0 compiles in this one, None chooses.
    cache:    whether whole graphs are kept for later processes, through torch's cache.
    verify:   whether each kernel's results are compared with eager's, whenever it runs.
    tune:     whether the tiles of kernels are measured, and the fastest ones taken.
    tune_seconds: that this may take for one graph.
    """

    numerics: str = "eager"
    rewrites: bool | str = True
    rng: str = "gems"
    layout: str = "auto"
    keep_weights: bool = False
    cudagraphs: bool = False
    strict: bool = False
    dump: str | None = None
    threads: int | None = None
    cache: bool = True
    verify: bool = False
    tune: bool = False
    tune_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, parse in PARSERS.items():
            found = getattr(self, name)
            try:
                object.__setattr__(self, name, parse(found))
            except _Bad as bad:
                raise OptionError(f"option {name!r} is {found!r}; valid: {bad}") from None

    @classmethod
    def from_call(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Config:
        """The config of ``torch.compile(..., mode=mode, options=options)``."""
        given = _given(mode, options)
        show_logs()
        return cls(**{**_from_environment(), **dumping.asked_for(), **given})

    def options(self) -> dict[str, Any]:
        """The settings as ``options=`` takes them: plain values, which the lower layers take."""
        return asdict(self)


def _given(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a call of ``torch.compile`` says, by our names."""
    if mode is not None and options is not None:
        raise OptionError(f"mode {mode!r} and options are both given; give one of them")
    if mode is not None:
        options = _of_mode(mode)
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options is a {type(options).__name__}; valid: a dict, None")
    given = {SAME_AS.get(name, name): value for name, value in (options or {}).items()}
    for name in given:
        if name not in PARSERS:
            raise OptionError(unknown("option", name, PARSERS))
    return given


def told(
    config: Config, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Each option of the ``config`` of such a call: its value, and where that came from."""
    sources = {v.field: name for name, v in VARIABLES.items() if v.field in _from_environment()}
    sources.update(dict.fromkeys(dumping.asked_for(), dumping.NAME))
    by = "options" if mode is None else f"mode {mode}"
    sources.update(dict.fromkeys(_given(mode, options), by))
    values = config.options().items()
    return {name: {"value": v, "from": sources.get(name, "default")} for name, v in values}


def _of_mode(mode: object) -> dict[str, Any]:
    """The options that a mode stands for."""
    if mode not in MODES:
        raise OptionError(unknown("mode", mode, MODES))
    if mode == "default":
        return {}
    tuned = {"tune": True} if mode in ("max-autotune", "max-autotune-no-cudagraphs") else {}
    return {"cudagraphs": mode != "max-autotune-no-cudagraphs", **tuned}


# --------------------------------------------------------------------------- the environment


def _text_switch(text: str) -> bool:
    lowered = text.lower()
    if lowered not in ("0", "1", "false", "true"):
        raise _Bad("0, 1, false, true")
    return lowered in ("1", "true")


def _text_rewrites(text: str) -> bool | str:
    if text.lower() == "memory":
        return "memory"
    try:
        return _text_switch(text)
    except _Bad as bad:
        raise _Bad(f"{bad}, memory") from None


def _text_workers(text: str) -> int | None:
    return _workers(_text_number(text, MAX_THREADS))


def _text_number(text: str, most: int) -> int:
    # isdecimal alone takes other scripts' digits, and int() underscores, signs and spaces
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise _Bad(f"a whole number from 0 to {most}")
    return int(text)


@dataclass(frozen=True)
class Variable:
    """One ``GEMS_*`` variable. ``field`` is the option it sets, None if it is the process's own."""

    field: str | None
    parse: Callable[[str], Any]
    values: str
    doc: str


VARIABLES: dict[str, Variable] = {
    "GEMS_NUMERICS": Variable(
        "numerics", PARSERS["numerics"], "eager, fast", "Where a fused chain rounds."
    ),
    "GEMS_REWRITES": Variable(
        "rewrites", _text_rewrites, "0, 1, memory", "Which patterns are rewritten."
    ),
    "GEMS_RNG": Variable("rng", PARSERS["rng"], "gems, eager", "Dropout's random numbers."),
    "GEMS_LAYOUT": Variable(
        "layout", PARSERS["layout"], "auto, keep, channels_last", "The layout of convolutions."
    ),
    "GEMS_KEEP_WEIGHTS": Variable(
        "keep_weights", _text_switch, "0, 1", "Whether converted weights are kept."
    ),
    "GEMS_CUDAGRAPHS": Variable(
        "cudagraphs", _text_switch, "0, 1", "Whether CUDA graphs are captured."
    ),
    "GEMS_STRICT": Variable("strict", _text_switch, "0, 1", "A failure inside us raises."),
    "GEMS_DUMP": Variable("dump", _folder, "a folder", "Every stage of every compile, as files."),
    "GEMS_THREADS": Variable(
        "threads", _text_workers, f"0 to {MAX_THREADS}", "Kernel compile workers."
    ),
    "GEMS_CACHE": Variable("cache", _text_switch, "0, 1", "Whether whole graphs are kept."),
    "GEMS_VERIFY": Variable(
        "verify", _text_switch, "0, 1", "Whether kernels are compared with eager."
    ),
    "GEMS_TUNE": Variable("tune", _text_switch, "0, 1", "Whether tiles are measured."),
    "GEMS_TUNE_SECONDS": Variable(
        "tune_seconds",
        lambda text: _seconds(_text_number(text, MAX_SECONDS)),
        f"0 to {MAX_SECONDS}",
        "How long, for a graph.",
    ),
    "GEMS_CACHE_DIR": Variable(None, _folder, "a folder", "Where compiled kernels are kept."),
    "GEMS_CACHE_SIZE": Variable(
        None, lambda text: _text_number(text, MAX_MB), f"0 to {MAX_MB} (MB)", "What it may hold."
    ),
    "GEMS_VENDOR": Variable(
        None,
        lambda text: text.lower(),
        "nvidia, amd, interpreter, or a plug-in's name",
        "The target; an unknown one is an error at first use.",
    ),
    "GEMS_DEBUG": Variable(
        None,
        lambda text: int(_one_of("0", "1", "2")(text)),
        "0, 1, 2",
        "1 logs decisions to stderr, 2 details as well.",
    ),
}


def _read(name: str) -> Any:
    """The parsed value of one variable; None when unset, empty or wrong (which warns once)."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return VARIABLES[name].parse(text)
    except _Bad as bad:
        _once(logging.WARNING, f"{name}={text!r} is ignored; valid: {bad}")
        return None


def _from_environment() -> dict[str, Any]:
    for name in os.environ:
        if name.startswith("GEMS_") and name not in VARIABLES:
            valid = ", ".join(VARIABLES)
            _once(
                logging.WARNING,
                f"{name} is no variable of gems-compile and is ignored; "
                f"valid: {valid}{nearest(name, VARIABLES, at_most=1)}",
            )
    found = {v.field: _read(name) for name, v in VARIABLES.items() if v.field is not None}
    return {field: value for field, value in found.items() if value is not None}


def vendor() -> str | None:
    """``GEMS_VENDOR``, not yet checked: ``kernels.target`` knows which vendors exist."""
    name: str | None = _read("GEMS_VENDOR")
    return name


def debug_level() -> int:
    """``GEMS_DEBUG``: 0 warnings only, 1 decisions too, 2 details too."""
    level: int | None = _read("GEMS_DEBUG")
    return level or 0


def show_logs() -> None:
    """Let the package's loggers reach stderr at ``GEMS_DEBUG``; unset leaves logging alone."""
    level = debug_level()
    if not level:
        return
    package = logging.getLogger(__package__)
    package.setLevel(logging.INFO if level == 1 else logging.DEBUG)
    if not package.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        package.addHandler(handler)


_said: set[str] = set()


def _once(level: int, message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.log(level, "%s", message)


# --------------------------------------------------------------------------- the cache directory


def cache_dir() -> str | None:
    """The directory of our cache, made if need be; None when there is none that is safe to use.

    ``$GEMS_CACHE_DIR``, else ``$XDG_CACHE_HOME/gems_compile``, else ``~/.cache/gems_compile``.
    What lies in it is code that this process will run, so it must belong to this user and be
    writable by nobody else. Nothing here raises: without a directory, kernels are compiled afresh.
    """
    path = _cache_path()
    problem = why_unsafe(path)
    if problem is None:
        return path
    _once(logging.WARNING, f"the cache directory {path} is not used: {problem}")
    return None


def cache_bytes() -> int:
    """What kernels may take there, in bytes: ``$GEMS_CACHE_SIZE`` MB, else 1 GB."""
    size: int | None = _read("GEMS_CACHE_SIZE")
    return Options.cache_bytes if size is None else size * 2**20


def why_unsafe(path: str) -> str | None:
    """Why what lies in a folder should not be run; makes the folder if need be."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        return _why_unsafe(path)
    except (OSError, ValueError) as error:
        return str(error)


def _cache_path() -> str:
    given = _read("GEMS_CACHE_DIR")
    if given is not None:
        return str(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "gems_compile")


def _why_unsafe(path: str) -> str | None:
    if not os.path.isabs(path):
        return "it is not absolute (no home directory is known)"
    user = os.geteuid()
    if os.lstat(path).st_uid != user:  # a link that another user planted
        return f"it belongs to user {os.lstat(path).st_uid}, not to user {user}"
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a directory"
    if found.st_uid != user:
        return f"it belongs to user {found.st_uid}, not to user {user}"
    if found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        return f"others can write to it (mode {mode:o}); run chmod go-w on it"
    if not os.access(path, os.W_OK | os.X_OK):
        return "it is not writable"
    return None
