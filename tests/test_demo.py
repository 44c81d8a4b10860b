"""The demo: eager's numbers, an honest verdict, JSON, and a command line that needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BACKEND, gems_only

if BACKEND == "gems":
    from gems_compile import __main__ as command
    from gems_compile.commands import demo

pytestmark = gems_only
SMALL = {
    "layers": 1,
    "dim": 16,
    "heads": 2,
    "kv_heads": 1,
    "hidden": 24,
    "vocabulary": 32,
    "batch": 2,
    "length": 8,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch._dynamo.reset()
    return demo.run(demo.Size(**SMALL), dump=str(tmp_path_factory.mktemp("demo")))


def test_gems_agrees_with_eager(result) -> None:
    assert result.passed
    assert {c.name for c in result.checks} == {"output", "loss", "gradients", "updated parameters"}
    for check in result.checks:
        assert 0 <= check.error <= check.limit


def test_the_model_is_compiled_as_it_should(result) -> None:
    graphs = result.explanation.graphs
    names = [f"{g.graph} {g.kind}" for g in graphs]
    assert names == ["0 inference", "1 forward", "1 backward"]
    for graph in graphs[:2]:
        rules = sorted(r.rule for r in graph.rewritten)
        assert rules == ["attention", "rms_norm", "rms_norm", "rms_norm"]
    for graph in graphs:
        assert graph.launches > 0
        calls = result.eager_calls[
            {"inference": "forward", "forward": "forward with gradients", "backward": "backward"}[
                graph.kind
            ]
        ]
        assert graph.launches + graph.aten_calls < calls


def test_the_dump_is_there(result) -> None:
    assert {p.name for p in Path(result.dump).iterdir()} == {
        "graph_00_inference",
        "graph_01_forward",
        "graph_01_backward",
    }
    kernels = (Path(result.dump) / "graph_01_forward/kernels").iterdir()
    assert any("# demo.py:" in k.read_text() for k in kernels)


def test_a_wrong_number_is_not_passed(result) -> None:
    seen = demo.Seen(
        {
            "logits": torch.ones(3),
            "loss": torch.ones(()),
            "gradient w": torch.ones(2),
            "updated w": torch.ones(2),
        },
        {},
        {},
    )
    off = demo.Seen({**seen.values, "gradient w": torch.tensor([1.0, 1.001])}, {}, {})
    nan = demo.Seen({**seen.values, "logits": torch.tensor([1.0, float("nan"), 1.0])}, {}, {})
    assert [c.name for c in demo._checks(off, seen, None) if not c.passed] == ["gradients"]
    assert [c.name for c in demo._checks(nan, seen, None) if not c.passed] == ["output"]
    assert all(c.passed for c in demo._checks(seen, seen, None))


def test_against_float32_eagers_own_error_is_the_measure() -> None:
    def seen(error: float) -> demo.Seen:
        values = dict.fromkeys(("logits", "loss", "gradient w", "updated w"), torch.ones(4) + error)
        return demo.Seen(values, {}, {})

    assert all(c.passed for c in demo._checks(seen(0.011), seen(0.01), seen(0.0)))
    assert not any(c.passed for c in demo._checks(seen(0.02), seen(0.01), seen(0.0)))


def test_main_prints_and_returns_the_verdict(result, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(demo, "run", lambda **_: result)
    assert demo.main(None, as_json=False) == 0
    printed = capsys.readouterr().out
    for text in ("Rewritten", "Runs as ATen", "eager beside gems", "gems agrees with eager"):
        assert text in printed
    assert max(map(len, printed.splitlines())) <= 100  # a path is not broken
    wrong = demo.Check("output", 1.0, 1e-4)
    broken = demo.Result(**{**vars(result), "checks": (wrong,)})
    monkeypatch.setattr(demo, "run", lambda **_: broken)
    assert demo.main(None, as_json=False) == 1
    assert "WRONG" in capsys.readouterr().out
    assert demo.main(None, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def run_command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "gems_compile", *args]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_demo_command(tmp_path: Path) -> None:
    done = run_command("demo", "--json", "--dump", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["passed"]
    assert data["dump"] == str(tmp_path / "here")
    assert (tmp_path / "here/graph_01_backward/plan.txt").exists()
    assert "gems:  backward took" in done.stderr


def test_the_doctor_command(tmp_path: Path) -> None:
    done = run_command("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"] == torch.__version__
    assert found["self-test"].startswith("passed: ")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_self_test_is_the_exit_code(monkeypatch, capsys) -> None:
    from gems_compile import backend
    from gems_compile.commands import doctor

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler today")

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "Compilation", fails)
    assert doctor.main(as_json=False) == 1
    assert "FAILED" in capsys.readouterr().out


def unset(monkeypatch, *names: str) -> None:
    """Unset them until the test ends, whatever it does to them meanwhile."""
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "interpreted"),
    [({}, "1"), ({"TRITON_INTERPRET": "0"}, "0"), ({"GEMS_VENDOR": "nvidia"}, None)],
)
def test_without_a_gpu_the_interpreter_is_chosen(monkeypatch, environment, interpreted) -> None:
    unset(monkeypatch, "TRITON_INTERPRET", "GEMS_VENDOR")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "_may_have_gpu", lambda: False)
    command._choose_target(["demo"])
    assert os.environ.get("TRITON_INTERPRET") == interpreted


def test_a_device_without_a_gpu_behind_it_starts_again(monkeypatch) -> None:
    from gems_compile.kernels import target

    started = []
    unset(monkeypatch, "TRITON_INTERPRET", "GEMS_VENDOR")
    monkeypatch.setattr(command, "_may_have_gpu", lambda: True)
    monkeypatch.setattr(target, "current_target", lambda: None)
    monkeypatch.setattr(os, "execv", lambda path, argv: started.append(argv))
    command._choose_target(["doctor", "--json"])
    assert started == [[sys.executable, "-m", "gems_compile", "doctor", "--json"]]
    assert os.environ["TRITON_INTERPRET"] == "1"
