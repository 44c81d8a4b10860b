"""`replay.py` in each folder of a dump: kernels beside eager, and which of them is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, gems_only, rand
from torch import nn
from torch.nn import functional as F
from wrongly import make_wrong, one_more

from gems_compile.backend import Gems
from gems_compile.errors import VerifyError
from gems_compile.insight.replay import main as replay

pytestmark = gems_only


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        h = F.dropout(F.gelu(self.up(self.norm(x))), 0.2)
        return (self.down(h) + x).log_softmax(-1)


def dumped(folder: Path, fn, *inputs, backward: bool = False, **kwargs) -> Path:
    compiled = torch.compile(fn, backend=Gems(), options={"dump": folder}, **kwargs)
    result = compiled(*inputs)
    if backward:
        result.square().sum().backward()
    torch._dynamo.reset()
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    return dumped(folder, Model().to(DEVICE), rand(10, 12, grad=True), backward=True)


@pytest.fixture
def broken(training, tmp_path) -> tuple[Path, str]:
    """A copy of it whose backward of GELU is wrong, and that kernel's name."""
    folder = tmp_path / "dump"
    shutil.copytree(training, folder)
    (file,) = (folder / "graph_00_backward" / "kernels").glob("*gelu_backward*")
    kernel, mark, reference = file.read_text().partition("# What eager PyTorch")
    file.write_text(one_more(kernel) + mark + reference)
    return folder / "graph_00_backward", file.stem


def asked(capsys, folder: Path, *options: str) -> tuple[int, dict]:
    code = replay(folder, [*options, "--json"])
    return code, json.loads(capsys.readouterr().out)


def what(found: dict) -> dict[str, str]:
    return {row["name"]: row["what"] for row in found["launches"]}


@pytest.mark.parametrize("mode", ["--check", "--bisect"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_right_kernels_are_the_same(training, capsys, kind, mode) -> None:
    code, found = asked(capsys, training / f"graph_00_{kind}", mode)
    assert code == 0
    kernels = {p.stem for p in (training / f"graph_00_{kind}" / "kernels").iterdir()}
    assert what(found) == dict.fromkeys(kernels, "same")
    assert "no launch differs" in found["said"]


def test_a_wrong_kernel_is_found_by_check(broken, capsys) -> None:
    folder, name = broken
    code, found = asked(capsys, folder, "--check")
    assert code == 1
    assert [n for n, said in what(found).items() if said == "differs"] == [name]
    (row,) = (row for row in found["launches"] if row["name"] == name)
    assert "gelu_backward: 200 of 200 elements differ" in row["detail"]
    assert "test_replay_dump.py" in row["detail"]


def test_a_wrong_kernel_is_the_first_that_bisect_finds(broken, capsys) -> None:
    folder, name = broken
    code, found = asked(capsys, folder, "--bisect")
    assert code == 1
    assert found["launches"][-1]["name"] == name
    assert found["said"].startswith(f"the first that differs is {name} (call ")
    assert "  addmm: float32[10, 20] from" in found["said"]


def test_a_group_and_saved_inputs(broken, capsys, tmp_path) -> None:
    folder, name = broken
    code, found = asked(capsys, folder, "--group", name)
    assert code == 1 and list(what(found)) == [name]
    data = json.loads((folder / "report.json").read_text())["replay"]
    (call,) = (c for c in data["calls"] if c["name"] == name)
    values = [data["values"][v] for v in call["loaded"]]
    tensors = {
        v: torch.zeros(about["shape"], dtype=getattr(torch, about["dtype"]))
        for v, about in zip(call["loaded"], values, strict=True)
    }
    torch.save(tensors, tmp_path / "inputs.pt")
    code, found = asked(capsys, folder, "--inputs", str(tmp_path / "inputs.pt"))
    assert code == 1 and list(what(found)) == [name]
    assert found["launches"][0]["fed"][call["loaded"][0]].endswith("from 0 to 0")
    assert replay(folder, ["--group", "no_such_kernel"]) == 2
    assert "no kernel is named 'no_such_kernel'; there are: fused_" in capsys.readouterr().err
    assert replay(folder, ["--inputs", str(tmp_path / "missing.pt")]) == 2
    torch.save({call["loaded"][0]: torch.zeros(3)}, tmp_path / "short.pt")
    assert replay(folder, ["--group", name, "--inputs", str(tmp_path / "short.pt")]) == 2
    assert "is float32[3], the dump's is float32[10, 20]" in capsys.readouterr().err


def test_it_runs_by_itself(training) -> None:
    path = training / "graph_00_forward" / "replay.py"
    done = subprocess.run([sys.executable, path, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "each launch and its reference" in done.stdout
    assert "no launch differs" in done.stdout


def test_times_are_written_for_every_call(training, capsys) -> None:
    for kind in ("forward", "backward"):
        code, found = asked(capsys, training / f"graph_00_{kind}", "--bench")
        assert code == 0
        assert ("no measure" in found["note"]) == (DEVICE == "cpu")
        assert all(row["us"] > 0 and row["eager_us"] > 0 for row in found["calls"])
    times = json.loads((training / "times.json").read_text())
    for kind in ("forward", "backward"):
        report = json.loads((training / f"graph_00_{kind}" / "report.json").read_text())
        assert len(times[f"graph_00_{kind}"]) == len(report["calls"])


def test_a_kernels_file_has_its_reference(training) -> None:
    texts = [p.read_text() for p in (training / "graph_00_forward/kernels").iterdir()]
    gelu = next(t for t in texts if "activation.gelu" in t)
    assert "# What eager PyTorch computes in its place:" in gelu
    assert "#       gelu = torch.ops.aten.gelu.default(addmm)  # f32[10, 20]" in gelu


def test_what_several_launches_make_is_checked_as_one(tmp_path, capsys) -> None:
    """The sums that the first launch leaves have no name; the second is fed with them."""
    x = rand(8, 6, 16, 16).contiguous(memory_format=torch.channels_last)
    folder = dumped(tmp_path, nn.BatchNorm2d(6).to(DEVICE), x) / "graph_00_forward"
    for mode in ("--check", "--bisect"):
        code, found = asked(capsys, folder, mode)
        assert code == 0
        assert {"same", "not checkable"} == set(what(found).values())
    told = [row["detail"] for row in found["launches"] if row["what"] == "not checkable"]
    assert all("is a step within" in text and "checked through" in text for text in told)


def test_sizes_are_those_of_the_trace(tmp_path, capsys) -> None:
    fn = dumped(tmp_path, lambda x: x.softmax(-1) * x.shape[0], rand(7, 5), dynamic=True)
    code, found = asked(capsys, fn / "graph_00_inference", "--check")
    assert code == 0 and "same" in what(found).values()
    data = json.loads((fn / "graph_00_inference" / "report.json").read_text())["replay"]
    assert [7, 5] in [v["shape"] for v in data["values"].values()]


def test_updates_in_place_and_a_graph_of_atens(tmp_path, capsys) -> None:
    def fn(total, x):
        total.mul_(0.5).add_(x.exp())
        return total.sum()

    folder = dumped(tmp_path / "a", fn, rand(30), rand(30)) / "graph_00_inference"
    for mode in ("--check", "--bisect"):
        assert asked(capsys, folder, mode)[0] == 0
    folder = dumped(tmp_path / "b", lambda x: x @ x, rand(8, 8)) / "graph_00_inference"
    code, found = asked(capsys, folder, "--check")
    assert code == 0 and found["launches"] == []


def test_verify_and_bisect_name_the_same_kernel(monkeypatch, tmp_path, capsys) -> None:
    names = make_wrong(monkeypatch, "sub")
    model, x = Model().to(DEVICE).eval().requires_grad_(False), rand(10, 12)
    code, found = asked(capsys, dumped(tmp_path, model, x) / "graph_00_inference", "--bisect")
    first = found["launches"][-1]["name"]
    assert code == 1 and first.rpartition("_")[0] in names
    compiled = torch.compile(model, backend=Gems(), options={"verify": True, "dump": tmp_path})
    with pytest.raises(VerifyError, match=first):
        compiled(x)
