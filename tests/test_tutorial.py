"""docs/tutorial.md is true: each of its blocks runs, in order, and prints what stands behind it."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import BACKEND, gems_only

if BACKEND == "gems":
    from explanations import Page

pytestmark = gems_only

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"

#: a reader: one Python session and a shell in one folder; answers with what each block printed
READER = """
def read():
    import contextlib, io, json, subprocess, sys, traceback

    sys.path.insert(0, "")
    answers = []
    for language, name, code in json.load(sys.stdin):
        printed, ran = io.StringIO(), True
        try:
            if language == "sh":
                run = subprocess.run(["sh", "-e", "-c", code], capture_output=True, text=True)
                printed.write(run.stdout + (run.stderr if run.returncode else ""))
                run.check_returncode()
            else:
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, name, "exec"), globals())
        except Exception:
            printed.write(traceback.format_exc())
            ran = False
        answers.append([printed.getvalue(), ran])
        if not ran:
            break
    json.dump(answers, sys.stdout)

read()
"""


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    expected: str | None

    @property
    def file(self) -> str | None:
        """The file that a reader saves it as."""
        named = re.match(r"# (\w+\.py)\n", self.code) if self.language == "python" else None
        return named and named[1]


def blocks() -> Iterator[Block]:
    """Each block that runs, with the output that is shown behind it."""
    text = TUTORIAL.read_text()
    fenced = list(re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for k, found in enumerate(fenced):
        language, code = found.groups()
        if language != "text":
            shown = fenced[k + 1] if k + 1 < len(fenced) and fenced[k + 1][1] == "text" else None
            line = text[: found.start()].count("\n") + 1
            yield Block(line, language, code, shown and shown[2])


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if block.file is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader works."""
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[tuple[str, bool]]:
    """What each block printed, and whether it ran; those behind one that failed did not."""
    if torch.cuda.is_available():
        pytest.skip("its outputs are of the interpreter, and it says so")
    for block in BLOCKS:
        if block.file is not None:
            (folder / block.file).write_text(block.code)
    told = json.dumps([(b.language, f"tutorial.md:{b.line}", b.code) for b in RUN])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "COLUMNS": "120", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", READER]
    done = subprocess.run(command, input=told, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(printed, ran) for printed, ran in json.loads(done.stdout)]


@pytest.mark.parametrize("k", range(len(RUN)), ids=lambda k: f"line{RUN[k].line}")
def test_a_block(k: int, answers: list[tuple[str, bool]]) -> None:
    block = RUN[k]
    assert k < len(answers), "a block before it failed"
    printed, ran = answers[k]
    assert ran, printed
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    wanted = block.expected or ""
    assert doctest.OutputChecker().check_output(wanted, printed, flags), printed


def test_the_page_shows_what_is_told_of_it(folder: Path, answers: list[tuple[str, bool]]) -> None:
    page = Page(folder / "before.html")
    boxes, tables = page.boxes(), page.data["graphs"][0]
    (lane,) = (lane for lane in tables["lanes"] if lane[0] == "attention.0")
    row = [b for b in boxes if lane[2] <= b["at"][1] < lane[2] + lane[4]]
    names = [page.texts[box["name"]] for box in row]
    turning = ["view_as_complex", "mul.Tensor", "view_as_real"]
    for k in (k for k, name in enumerate(names) if name == turning[0]):
        assert row[k - 1]["kind"] == "kernel" and "rsqrt" in names[k - 1]
        assert names[k : k + 3] == turning
    assert names.count("mul.Tensor") == 2  # of the queries and of the keys
    others = [row for row in tables["aten"] if row["name"] != "mm"]
    assert others[0]["name"] == "mul.Tensor" and "decoder.py:10" in others[0]["line"]
    assert [len(row["steps"]) for row in others if row["name"] in turning] == [4, 4, 4]
    assert not any("complex" in row["reason"] for row in tables["unfused"])
    (rewritten,) = Page(folder / "after.html").data["graphs"][0]["rewritten"]
    assert (rewritten["rule"], rewritten["times"]) == ("turn_in_reals", 4)


def test_outputs_stand_behind_blocks_that_run() -> None:
    shown = TUTORIAL.read_text().count("```text\n")
    assert shown == sum(block.expected is not None for block in RUN) >= 10
    assert [block.file for block in BLOCKS if block.file] == ["decoder.py", "train.py", "rotary.py"]


def test_its_links_lead_somewhere() -> None:
    for page in ("docs/index.md", "docs/dumps.md", "README.md"):
        assert "tutorial.md" in (ROOT / page).read_text(), page
    for target, heading in re.findall(r"\]\(([\w./]+\.md)#?([\w-]*)\)", TUTORIAL.read_text()):
        text = (TUTORIAL.parent / target).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        known = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
        assert not heading or heading in known, (target, heading)
