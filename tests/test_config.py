"""Options, modes and GEMS_* variables: what is accepted, what is refused and in which words."""

from __future__ import annotations

import logging
import os
import re
import stat
from dataclasses import fields
from pathlib import Path

import pytest

from gems_compile import config
from gems_compile.config import MODES, PARSERS, VARIABLES, Config
from gems_compile.errors import GemsError, OptionError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GEMS_* variable from outside, and nothing said yet."""
    for name in list(os.environ):
        if name.startswith("GEMS_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(config, "_said", set())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_defaults() -> None:
    assert Config.from_call() == Config()
    assert Config().options() == {
        "numerics": "eager",
        "rewrites": True,
        "rng": "gems",
        "layout": "auto",
        "keep_weights": False,
        "cudagraphs": False,
        "strict": False,
        "dump": None,
        "threads": None,
        "cache": True,
        "verify": False,
        "tune": False,
        "tune_seconds": 10.0,
    }
    assert {field.name for field in fields(Config)} == set(PARSERS)


def test_options_override_the_environment_which_overrides_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GEMS_NUMERICS", "fast")
    monkeypatch.setenv("GEMS_STRICT", "1")
    monkeypatch.setenv("GEMS_REWRITES", "0")
    monkeypatch.setenv("GEMS_THREADS", "3")
    monkeypatch.setenv("GEMS_RNG", "eager")
    monkeypatch.setenv("GEMS_DUMP", "somewhere")
    everywhere = Config(
        numerics="fast",
        strict=True,
        rewrites=False,
        threads=3,
        rng="eager",
        dump=os.path.abspath("somewhere"),
    )
    assert Config.from_call() == everywhere
    assert Config.from_call(options={"numerics": "eager", "threads": 0, "dump": None}) == Config(
        strict=True, rewrites=False, rng="eager", threads=0
    )


def test_a_config_is_a_key() -> None:
    fast = Config(numerics="fast")
    assert {fast: 1}[Config.from_call(options={"numerics": "fast"})] == 1
    assert hash(fast) != hash(Config())
    with pytest.raises(AttributeError):
        fast.numerics = "eager"  # type: ignore[misc]


def test_options_come_back_from_a_config() -> None:
    given = Config(numerics="fast", dump="/tmp/x", threads=2)
    assert Config.from_call(options=given.options()) == given


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_torch_is_accepted(mode: str) -> None:
    captures = mode in ("reduce-overhead", "max-autotune")
    tunes = mode.startswith("max-autotune")
    assert Config.from_call(mode=mode) == Config(cudagraphs=captures, tune=tunes)


def test_a_mode_takes_its_seconds_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMS_TUNE_SECONDS", "3")
    assert Config.from_call(mode="max-autotune").tune_seconds == 3
    assert Config.from_call(options={"max_autotune": True, "tune_seconds": 0.5}) == Config(
        tune=True, tune_seconds=0.5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"mode": "reduce_overhead"},
            "mode 'reduce_overhead' is unknown; valid: default, reduce-overhead, max-autotune, "
            "max-autotune-no-cudagraphs; close to it: reduce-overhead",
        ),
        (
            {"options": {"numeric": "fast"}},
            "option 'numeric' is unknown; valid: numerics, rewrites, rng, layout, "
            "keep_weights, cudagraphs, strict, dump, threads, cache, verify, tune, "
            "tune_seconds; "
            "close to it: numerics",
        ),
        (
            {"options": {"numerics": "fats"}},
            "option 'numerics' is 'fats'; valid: eager, fast; close to it: fast",
        ),
        ({"options": {"strict": "yes"}}, "option 'strict' is 'yes'; valid: True, False"),
        (
            {"options": {"rewrites": "all"}},
            "option 'rewrites' is 'all'; valid: True, False, memory",
        ),
        ({"options": {"strict": 1}}, "option 'strict' is 1; valid: True, False"),
        (
            {"options": {"threads": -1}},
            "option 'threads' is -1; valid: a whole number from 0 to 256, None",
        ),
        (
            {"options": {"threads": True}},
            "option 'threads' is True; valid: a whole number from 0 to 256, None",
        ),
        (
            {"options": {"tune_seconds": -1}},
            "option 'tune_seconds' is -1; valid: a number from 0 to 3600",
        ),
        ({"options": {"dump": 3}}, "option 'dump' is 3; valid: a folder's path, None"),
        ({"options": ["strict"]}, "options is a list; valid: a dict, None"),
        (
            {"mode": "default", "options": {}},
            "mode 'default' and options are both given; give one of them",
        ),
    ],
)
def test_a_wrong_call_is_one_clear_sentence(call: dict, message: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$") as caught:
        Config.from_call(**call)
    assert isinstance(caught.value, (ValueError, GemsError))


def test_a_config_made_directly_is_checked_too() -> None:
    with pytest.raises(OptionError, match="option 'rng' is 'philox'; valid: gems, eager"):
        Config(rng="philox")


@pytest.mark.parametrize(
    ("name", "text", "valid"),
    [
        ("GEMS_NUMERICS", "quick", "eager, fast"),
        ("GEMS_STRICT", "yes", "0, 1, false, true"),
        ("GEMS_REWRITES", "2", "0, 1, false, true"),
        ("GEMS_THREADS", "many", "a whole number from 0 to 256"),
        ("GEMS_THREADS", "1_0", "a whole number from 0 to 256"),
        ("GEMS_THREADS", "257", "a whole number from 0 to 256, None"),
        ("GEMS_THREADS", "9" * 5000, "a whole number from 0 to 256"),
        ("GEMS_RNG", "Gems!", "gems, eager"),
    ],
)
def test_a_bad_variable_warns_once_and_is_ignored(
    name: str,
    text: str,
    valid: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(name, text)
    assert Config.from_call() == Config.from_call() == Config()
    (said,) = warnings_of(caplog)
    assert said.startswith(f"{name}={text!r} is ignored; valid: {valid}")


def test_an_empty_variable_is_an_unset_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, " ")
    assert Config.from_call() == Config()
    assert config.vendor() is None
    assert config.debug_level() == 0
    assert warnings_of(caplog) == []


def test_an_unknown_variable_warns_once_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GEMS_STRICKT", "1")
    assert Config.from_call() == Config.from_call() == Config()
    (said,) = warnings_of(caplog)
    assert said.startswith("GEMS_STRICKT is no variable of gems-compile and is ignored; valid: ")
    assert said.endswith("; close to it: GEMS_STRICT")


def test_the_process_wide_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.vendor() is None
    monkeypatch.setenv("GEMS_VENDOR", "NVIDIA")
    assert config.vendor() == "nvidia"
    monkeypatch.setenv("GEMS_DEBUG", "2")
    assert config.debug_level() == 2


@pytest.mark.parametrize(("text", "level"), [("1", logging.INFO), ("2", logging.DEBUG)])
def test_debug_opens_the_package_logger(
    text: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = logging.getLogger("gems_compile")
    monkeypatch.setattr(package, "level", logging.NOTSET)
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", False)
    Config.from_call()
    assert (package.level, package.handlers) == (logging.NOTSET, [])
    monkeypatch.setenv("GEMS_DEBUG", text)
    Config.from_call()
    Config.from_call()
    assert package.level == level
    assert len(package.handlers) == 1


# --------------------------------------------------------------------------- the cache directory


def test_cache_dir_is_made_private_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not (tmp_path / "gems_compile").exists()
    previous = os.umask(0)
    try:
        found = config.cache_dir()
    finally:
        os.umask(previous)
    assert found == str(tmp_path / "gems_compile")
    assert stat.S_IMODE(os.stat(found).st_mode) == 0o700
    assert config.cache_dir() == found


def test_cache_dir_comes_from_the_first_of_three_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert config.cache_dir() == str(tmp_path / "home/.cache/gems_compile")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by its specification
    assert config.cache_dir() == str(tmp_path / "home/.cache/gems_compile")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_dir() == str(tmp_path / "xdg/gems_compile")
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path / "mine"))
    assert config.cache_dir() == str(tmp_path / "mine")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_cache_others_can_write_to_is_refused_once(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(mode)
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path))
    assert config.cache_dir() is None
    assert config.cache_dir() is None
    (said,) = warnings_of(caplog)
    assert said == (
        f"the cache directory {tmp_path} is not used: others can write to it (mode {mode:o}); "
        "run chmod go-w on it"
    )
    assert stat.S_IMODE(tmp_path.stat().st_mode) == mode  # not ours to change


def test_a_cache_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert config.cache_dir() is None
    assert f"belongs to user {owner}, not to user {owner + 1}" in warnings_of(caplog)[0]


def test_a_cache_path_that_cannot_be_a_directory_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere/at/all")
    for path in ("file", "file/below", "dangling", "x" * 300):
        monkeypatch.setenv("GEMS_CACHE_DIR", str(tmp_path / path))
        assert config.cache_dir() is None
    assert len(warnings_of(caplog)) == 4


# --------------------------------------------------------------------------- the documentation


def test_the_documentation_lists_every_name() -> None:
    text = (ROOT / "docs/options.md").read_text()
    documented = set(re.findall(r"^\| `(\w[\w-]*)` \|", text, re.MULTILINE))
    assert documented == {*MODES, *PARSERS, *VARIABLES}


def test_no_other_file_reads_a_gems_variable() -> None:
    pattern = re.compile(r"(?:environ|getenv).*[\"']GEMS_\w+")
    # __main__ and the demo may set a variable for a process that they start, but not read one
    readers = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("gems_compile", "lowering", "kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != ROOT / "gems_compile/config.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert readers == []
