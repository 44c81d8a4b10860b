"""Choices of tiles on disk: read back, damaged, or not to be written."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import gems_only

from gems_compile.lowering.choices import Choice, Choices
from gems_compile.lowering.schedule import Tile

pytestmark = gems_only


def test_a_choice_survives_the_disk(tmp_path: Any) -> None:
    told = Choice(
        Tile(64, 128, 8, 2, 4, True), ((Tile(32), 1.5), (Tile(64, 128, 8, 2, 4, True), None))
    )
    store = Choices("H200", {})
    path = store.path(str(tmp_path / "k"), (3,))
    store.keep(path, told)
    assert Choices("H200", {}).recall(path, [told.tile]) == told
    assert Choices("H200", {}).recall(path, [Tile(32)]) is None  # nobody would try it
    others = {
        Choices("H100", {}).path(str(tmp_path / "k"), (3,)),
        store.path(str(tmp_path / "k"), (4,)),
    }
    assert path not in others and len(others) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"tile": {"x": 64}}', '{"tile": {"x": "64"}, "times": []}', "{}", "\0"]
)
def test_a_damaged_choice_is_a_miss(text: str, tmp_path: Any, caplog: Any) -> None:
    store = Choices("H200", {})
    path = store.path(str(tmp_path / "k"), (3,))
    with open(path, "w") as f:
        f.write(text)
    with caplog.at_level("INFO", logger="gems_compile"):
        assert store.recall(path, [Tile(64)]) is None
    assert "a choice of tiles is not read" in caplog.text


def test_a_choice_that_cannot_be_written_serves_this_process(tmp_path: Any, caplog: Any) -> None:
    store = Choices("H200", {})
    (tmp_path / "no").write_text("a file")
    path = store.path(str(tmp_path / "no" / "k"), (3,))
    with caplog.at_level("INFO", logger="gems_compile"):
        store.keep(path, Choice(Tile(64)))
    assert store.recall(path, [Tile(64)]) == Choice(Tile(64))
    assert "a choice of tiles is not kept" in caplog.text
