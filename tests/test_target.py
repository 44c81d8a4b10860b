"""Targets: which one this process has, which can be compiled for, and which a plug-in adds."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gems_compile.errors import UnknownVendor
from gems_compile.kernels import target as targets
from gems_compile.kernels.target import Target, compile_target, current_target


@pytest.fixture(autouse=True)
def forgetful() -> Any:
    """Each test looks for targets afresh, and leaves none of its own behind."""

    def forget() -> None:
        for function in (targets._detected, targets._asked_for, targets._plug_ins):
            function.cache_clear()

    forget()
    yield
    forget()


def in_a_process(code: str, **environment: str | None) -> str:
    """What ``code`` prints in a fresh process with these variables set, or unset where None."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    run = [sys.executable, "-c", code]
    return subprocess.run(run, env=env, check=True, capture_output=True, text=True).stdout.strip()


def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_find_interpreter", lambda: None)


def gpu(monkeypatch: pytest.MonkeyPatch, hip: str | None = None, **facts: Any) -> None:
    """Make torch describe a GPU that this machine need not have."""
    no_interpreter(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**facts))
    monkeypatch.setattr(torch.version, "hip", hip)


def plug_in(monkeypatch: pytest.MonkeyPatch, **functions: str) -> None:
    found = [EntryPoint(name, value, targets.PLUG_INS) for name, value in functions.items()]
    monkeypatch.setattr(targets, "entry_points", lambda group: found)


OTHER = Target("other", "xpu", "XPU", "intel", "pvc", 16, 64)


def make_other() -> Target:
    return OTHER


def make_nothing() -> None:
    return None


def make_rubbish() -> int:
    return 3


def fail() -> Target:
    raise RuntimeError("driver too old")


# --------------------------------------------------------------------------- detection

NAME = "import gems_compile; print(gems_compile.vendor_name)"


def test_the_interpreter_is_used_where_it_was_asked_for() -> None:
    assert in_a_process(NAME, TRITON_INTERPRET="1", GEMS_VENDOR=None) == "interpreter"


def test_without_gpu_or_interpreter_there_is_no_target() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    assert in_a_process(NAME, TRITON_INTERPRET=None, GEMS_VENDOR=None, **hidden) == "none"


def test_the_interpreter_asked_for_too_late_is_not_used() -> None:
    code = (
        "import triton, os, logging; logging.basicConfig(format='%(message)s');"
        "os.environ['TRITON_INTERPRET'] = '1';"
        "from gems_compile.kernels.target import _find_interpreter; print(_find_interpreter())"
    )
    assert in_a_process(code, TRITON_INTERPRET=None) == "None"


def test_an_unknown_vendor_is_an_error_at_first_use_and_not_at_import() -> None:
    code = (
        "import gems_compile\n"
        "try: gems_compile.vendor_name\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    assert in_a_process(code, GEMS_VENDOR="nvidea") == (
        "UnknownVendor vendor 'nvidea' (GEMS_VENDOR) is unknown; "
        "valid: nvidia, amd, interpreter; close to it: nvidia"
    )


def test_importing_targets_loads_neither_torch_nor_triton() -> None:
    code = (
        "import sys, gems_compile.kernels.target;"
        "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    )
    assert in_a_process(code) == "[]"


def test_an_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, major=9, minor=0, multi_processor_count=132)
    found = current_target()
    assert found is not None
    assert (found.name, found.device, found.dispatch_key) == ("nvidia", "cuda", "CUDA")
    assert (found.backend, found.arch, found.warp, found.multiprocessors) == ("cuda", 90, 32, 132)
    assert found.label == "nvidia:sm90"
    assert found == compile_target("nvidia", 90)
    assert current_target("nvidia") == found


def test_an_amd_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"gcnArchName": "gfx942:sramecc+:xnack-", "multi_processor_count": 304}
    gpu(monkeypatch, hip="6.4", **facts)
    found = current_target()
    assert found is not None
    assert (found.name, found.device, found.dispatch_key) == ("amd", "cuda", "CUDA")
    assert (found.backend, found.arch, found.warp) == ("hip", "gfx942", 64)
    assert found.label == "amd:gfx942"
    assert found == compile_target("amd", "gfx942")


def test_a_vendor_that_is_not_here_is_no_target_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(monkeypatch, major=8, minor=0, multi_processor_count=108)
    with caplog.at_level(logging.WARNING, logger="gems_compile"):
        assert current_target("amd") is None
        assert current_target("amd") is None
    assert [record.getMessage() for record in caplog.records] == [
        "vendor 'amd' is not available here (torch sees no such device); graphs run as ATen"
    ]


@pytest.mark.gpu
def test_the_gpu_of_this_machine() -> None:
    found = targets._find_gpu()
    assert found is not None
    assert found.name == ("amd" if torch.version.hip else "nvidia")
    assert found.multiprocessors > 0
    from triton.runtime import driver

    assert found.triton_target() == driver.active.get_current_target()


# --------------------------------------------------------------------------- cross compiling


@pytest.mark.parametrize(
    ("name", "arch", "warp"),
    [("nvidia", 80, 32), ("nvidia", 90, 32), ("amd", "gfx942", 64), ("amd", "gfx1100", 32)],
)
def test_a_target_to_compile_for_in_tritons_words(name: str, arch: int | str, warp: int) -> None:
    found = compile_target(name, arch).triton_target()
    backend = {"nvidia": "cuda", "amd": "hip"}[name]
    assert (found.backend, found.arch, found.warp_size) == (backend, arch, warp)


def test_triton_compiles_a_kernel_for_each() -> None:
    code = """
import os, sys, tempfile, importlib.util
from pathlib import Path
source = '''
import triton, triton.language as tl
@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, offs < n), offs < n)
'''
folder = Path(tempfile.mkdtemp())
os.environ["TRITON_CACHE_DIR"] = str(folder)
(folder / "double.py").write_text(source)
spec = importlib.util.spec_from_file_location("double", folder / "double.py")
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
import triton
from triton.compiler import ASTSource
from gems_compile.kernels.target import compile_target
signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
for name, arch in (("nvidia", 80), ("nvidia", 90), ("amd", "gfx942")):
    src = ASTSource(module.double, signature, {"BLOCK": 128})
    kernel = triton.compile(src, target=compile_target(name, arch).triton_target())
    print("cubin" in kernel.asm or "hsaco" in kernel.asm)
"""
    assert in_a_process(code, TRITON_INTERPRET=None).split() == ["True"] * 3


@pytest.mark.parametrize(("name", "arch"), [("nvidia", "sm90"), ("amd", 90), ("intel", "pvc")])
def test_a_target_nobody_can_compile_for(name: str, arch: int | str) -> None:
    with pytest.raises(UnknownVendor, match=r"valid: 'nvidia' with a number"):
        compile_target(name, arch)


def test_the_interpreter_has_nothing_to_compile_for() -> None:
    with pytest.raises(ValueError, match="'interpreter' has no compiler"):
        targets.INTERPRETER.triton_target()
    assert targets.INTERPRETER.label == "interpreter"


def test_a_part_without_bfloat16() -> None:
    assert "bfloat16" not in compile_target("nvidia", 75).dtypes
    assert "bfloat16" in compile_target("nvidia", 80).dtypes


# --------------------------------------------------------------------------- plug-ins


def test_a_plug_in_adds_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    no_interpreter(monkeypatch)
    plug_in(monkeypatch, absent=f"{__name__}:make_nothing", other=f"{__name__}:make_other")
    assert current_target() is OTHER
    assert current_target("other") is OTHER
    with pytest.raises(UnknownVendor, match="valid: nvidia, amd, interpreter, absent, other"):
        current_target("others")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fail", "failed: RuntimeError: driver too old"),
        ("not_there", "failed: AttributeError"),
        ("make_rubbish", "gave a int, no Target"),
    ],
)
def test_a_broken_plug_in_is_a_warning(
    value: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_interpreter(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plug_in(monkeypatch, broken=f"{__name__}:{value}")
    with caplog.at_level(logging.WARNING, logger="gems_compile"):
        assert current_target() is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"the plugged-in target 'broken' {words}")


def test_a_plug_in_cannot_take_a_built_in_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu(monkeypatch, major=9, minor=0, multi_processor_count=132)
    plug_in(monkeypatch, nvidia=f"{__name__}:make_other")
    with caplog.at_level(logging.WARNING, logger="gems_compile"):
        assert current_target() == compile_target("nvidia", 90)
    assert "'nvidia' is ignored: that name is built in" in caplog.text
