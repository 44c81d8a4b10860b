"""``python -m gems_compile``: its commands, what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BACKEND, DEVICE, gems_only

if BACKEND == "gems":
    import gems_compile
    from gems_compile.__main__ import main
    from gems_compile.backend import gems
    from gems_compile.commands import bench, doctor, script, targets
    from gems_compile.kernels import target
    from gems_compile.lowering import progress

pytestmark = gems_only


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def refused(argv: list[str], capsys) -> str:
    """The last line of a refusal, whose exit code is 2."""
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's
        code = end.code
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


# the parser --------------------------------------------------------------------------------------

COMMANDS = ("demo", "doctor", "explain", "page", "ops", "targets", "cache", "bench")


def test_a_typo_has_its_nearest_name(capsys) -> None:
    assert refused(["dmo"], capsys) == (
        f"gems: error: command 'dmo' is unknown; valid: {', '.join(COMMANDS)}; close to it: demo"
    )
    assert refused(["doctor", "--jsn"], capsys) == (
        "gems doctor: error: --jsn is not known here; close to it: --json"
    )
    assert refused([], capsys).startswith("gems: error: the following arguments are required")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_a_vendor_that_does_not_exist_is_a_mistake(monkeypatch, capsys) -> None:
    monkeypatch.setenv("GEMS_VENDOR", "nvdia")
    found = refused(["targets"], capsys)
    assert found.startswith("vendor 'nvdia' (GEMS_VENDOR) is unknown; valid: nvidia, amd")
    assert found.endswith("close to it: nvidia")


# explain -----------------------------------------------------------------------------------------

PROGRAM = f"""
import sys
import torch
import beside

class Thing:
    pass

def scaled(x):
    return x.sin() * 2

if __name__ == "__main__":
    import pickle

    pickle.loads(pickle.dumps(Thing()))
    print("program:", sys.argv[1:], beside.NAME, __file__ == sys.argv[0])
    device = "{DEVICE}"
    backend = {{"backend": "gems"}} if "gems" in sys.argv else {{}}
    compiled = torch.compile(scaled, **backend)
    compiled(torch.ones(4, 8, device=device))
    compiled(torch.ones(4, 16, device=device))
    torch._dynamo.reset()
    backend = backend or {{"backend": "inductor"}}
    compiled = torch.compile(lambda x: x.cos().softmax(-1), **backend)
    compiled(torch.ones(4, 8, device=device))
    if "raise" in sys.argv:
        raise RuntimeError("boom")
    if "exit" in sys.argv:
        sys.exit("no more")
    if "zero" in sys.argv:
        sys.exit(0)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "beside.py").write_text("NAME = 'a neighbour'\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    yield str(tmp_path / "program.py")
    sys.modules.pop("beside", None)


def test_a_script_runs_as_it_is_and_is_explained(program: str, capsys) -> None:
    argv, path, module = list(sys.argv), list(sys.path), sys.modules["__main__"]
    assert main(["explain", program, "gems", "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("program: ['gems', '--json'] a neighbour True\n")
    assert "program.py, compiled by gems (target: " in printed
    assert "  2 inference " in printed  # numbered on behind the reset
    text = " ".join(printed.split())
    assert "scaled was compiled again: size of x, dim 1, changed 8 -> 16" in text
    assert "program.py:9 def scaled(x):" in text
    assert (sys.argv, sys.path, sys.modules["__main__"]) == (argv, path, module)
    assert gems.watchers == [] and not gems.fresh


def test_json_is_all_that_is_printed(program: str, capsys) -> None:
    assert main(["explain", "--json", program, "gems", "zero"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [g["graph"] for g in found["graphs"]] == [0, 1, 2]
    assert [g["cache"][:4] for g in found["graphs"]] != ["from"] * 3
    assert [r["graph"] for r in found["recompiles"]] == [1]
    assert "program: " in printed.err


def test_why_prints_facts(program: str, capsys) -> None:
    assert main(["explain", "--why", "softmax", program, "gems"]) == 0
    facts = capsys.readouterr().out.splitlines()[1:]
    assert facts and all("softmax" in fact for fact in facts)
    assert main(["explain", "--json", "--why", "no such op", program, "gems"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["explain", "--why", "no such op", program, "gems"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "No fact holds 'no such op'."


def test_a_script_that_names_no_backend(program: str, capsys) -> None:
    real = torch.compile
    assert main(["explain", "--backend", "gems", "--json", program]) == 0
    assert len(json.loads(capsys.readouterr().out)["graphs"]) == 3
    assert torch.compile is real
    default = getattr(torch.compiler, "get_default_backend", lambda: "inductor")
    assert default() == "inductor"


def test_a_script_that_compiles_nothing_says_what_to_do(tmp_path: Path, capsys) -> None:
    (tmp_path / "plain.py").write_text("print('plain')\n")
    assert main(["explain", str(tmp_path / "plain.py")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("plain ")
    assert printed.endswith(" ".join(script.NOTHING.split()))


@pytest.mark.parametrize(("word", "says"), [("raise", "RuntimeError: boom"), ("exit", "no more")])
def test_the_scripts_failure_is_the_exit_code(program: str, word: str, says: str, capsys) -> None:
    assert main(["explain", program, "gems", word]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == says
    assert "runpy" not in printed.err and "gems_compile/commands/script.py" not in printed.err
    assert "compiled by gems" in printed.out


def test_scripts_that_are_not_there(program: str, capsys) -> None:
    missing = program.replace("program.py", "porgram.py")
    assert refused(["explain", missing], capsys) == (
        f"there is no script {missing}; close to it: program.py"
    )


def test_a_page(program: str, tmp_path, capsys) -> None:
    page = tmp_path / "a.html"
    assert main(["explain", "--html", str(page), program, "gems"]) == 0
    assert "<title>program.py: gems</title>" in page.read_text()
    assert capsys.readouterr().err.endswith(f"The page is {page}\n")
    nowhere = str(tmp_path / "none" / "a.html")
    assert "there is no folder" in refused(["explain", "--html", nowhere, program], capsys)


def test_the_command_itself(program: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "gems_compile", "explain", "--json", program, "gems"]
    done = subprocess.run(words, cwd=Path(program).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(g["numbers"]["launches"] for g in found["graphs"]) >= 3
    assert [g["failures"] for g in found["graphs"]] == [[], [], []]


# targets, doctor, bench --------------------------------------------------------------------------


def test_targets_in_json(capsys) -> None:
    assert main(["targets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    here = target.current_target()
    assert found["chosen"] == here.label
    (chosen,) = [e for e in found["entries"] if e["chosen"]]
    assert (chosen["name"], chosen["here"], chosen["why"]) == (here.name, here.label, "")
    names = [e["name"] for e in found["entries"]]
    assert names[:3] == ["nvidia", "amd", "interpreter"]
    nvidia = found["entries"][0]
    assert {"sm_80", "sm_90", "sm_100"} <= set(nvidia["compiles_for"])


def test_why_a_target_is_chosen(monkeypatch, capsys) -> None:
    assert main(["targets"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{target.current_target().label} is chosen: " in printed
    one = target.compile_target("nvidia", 90)
    assert targets._because("nvidia", one) == "GEMS_VENDOR=nvidia asks for it"
    assert targets._because("amd", None) == "GEMS_VENDOR=amd asks for it, and it is not here"
    assert targets._because(None, one).startswith("torch sees the GPU")
    none = targets.Listed((), None, targets._because(None, None))
    assert targets._sentence(none).startswith("None is chosen: torch sees no GPU, no plug-in")


def test_a_plug_in_is_listed_with_where_it_comes_from(monkeypatch) -> None:
    class Point:
        value = "vendor.package:found"

        def load(self):
            return lambda: target.Target("own", "cpu", "CPU", "cuda", 99, 32, 8)

    monkeypatch.setattr(target, "_plug_ins", lambda: {"own": Point(), "other": Broken()})
    entries = {e.name: e for e in targets.listed().entries}
    own = entries["own"]
    assert (own.origin, own.here, own.compiles_for) == (
        "plug-in vendor.package:found",
        "own:99",
        ("cuda:99",),
    )
    assert entries["other"].why == "not here: its function returned no target"


class Broken:
    value = "vendor.package:broken"

    def load(self):
        return lambda: None


def test_the_doctor_tells_everything(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"gems-compile", "torch", "triton", "python", "system", "device", "driver", "target"}
    assert found.keys() >= {*names, "cache", "cached", "whole graphs", "launcher", "self-test"}
    assert all(found.values())
    assert found["self-test"].startswith("passed: ")


def test_a_failed_self_test_is_the_exit_code(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "_self_test", lambda *_: "FAILED: differs from eager by 1.0e+00")
    assert main(["doctor"]) == 1
    assert "FAILED: differs from eager" in capsys.readouterr().out


def test_benchmarks_are_listed_with_a_line_each(capsys) -> None:
    assert main(["bench", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == "Time whole models"
    assert found.keys() >= {"attention", "compile_time", "eager", "groups", "host", "ops", "soak"}
    assert not {name for name in found if name.endswith("worker")}
    for says in found.values():
        assert says and "\n" not in says and "``" not in says
    assert main(["bench"]) == 0
    assert "Time whole models" in capsys.readouterr().out


def test_a_benchmark_runs_with_its_arguments(monkeypatch) -> None:
    calls = []

    def run(words, cwd):
        calls.append((words[1:], cwd))
        return subprocess.CompletedProcess(words, codes.pop())

    monkeypatch.setattr(bench.subprocess, "run", run)
    codes = [-9, 2, 0]
    given = ["bench", "ops", "--ops", "softmax", "--json"]
    assert [main(given) for _ in range(3)] == [0, 2, 1]
    assert calls[0] == (["-m", "benchmarks.ops", "--ops", "softmax", "--json"], bench.repository())


def test_benchmarks_that_are_not_there(monkeypatch, capsys) -> None:
    assert refused(["bench", "modls"], capsys).endswith("; close to it: models")
    monkeypatch.setattr(bench, "repository", lambda: None)
    assert refused(["bench"], capsys) == bench.WHERE


# waiting -----------------------------------------------------------------------------------------


def test_nothing_is_shown_off_a_terminal_or_where_it_is_soon_over(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.Waiting("long") as waiting:
        assert not waiting.timer.is_alive()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    with progress.Waiting("short") as waiting:
        assert waiting.timer.is_alive()
    waiting.timer.join(5)
    assert not waiting.timer.is_alive()
    assert capsys.readouterr().err == ""


def test_a_terminal_sees_a_sign_of_life(monkeypatch, capsys) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Waiting("long") as waiting:
        waiting.timer.join(30)
        assert waiting.status is not None
    assert "long ..." in capsys.readouterr().err


def test_the_package_tells_of_its_dump() -> None:
    assert gems_compile.dump.__name__ == "dump"
    assert "dump" in gems_compile.__all__
