"""A wrapper's text is compiled by a worker where kernels are, and here where it fails."""

from __future__ import annotations

import os
from typing import Any

import pytest

from gems_compile.lowering.code import Code
from gems_compile.lowering.load import Pool

TEXT = "def call(args):\n    return args[0] + 1\n"


def ran(code: Code) -> Any:
    scope: dict[str, Any] = {}
    exec(code.result(), scope)
    assert scope["call"].__code__.co_filename == "<gems graph>"
    return scope["call"]([1])


def test_without_workers() -> None:
    assert ran(Code(TEXT, "graph", None)) == 2


def test_by_a_worker() -> None:
    pool = Pool(2)
    try:
        codes = [Code(TEXT, "graph", pool), Code(TEXT, "graph", pool)]
        assert codes[0].found is None
        assert [ran(code) for code in codes] == [2, 2]
        assert ran(codes[0]) == 2
        assert not os.path.exists(codes[0].path)
    finally:
        pool.close()


def test_text_that_is_no_python() -> None:
    pool = Pool(2)
    try:
        with pytest.raises(SyntaxError):
            Code("is no Python", "graph", pool).result()
    finally:
        pool.close()


def test_workers_that_died() -> None:
    pool = Pool(2)
    code = Code(TEXT, "graph", pool)
    pool.close()
    assert ran(code) == 2


def test_another_process_compiles_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(2)
    try:
        code = Code(TEXT, "graph", pool)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        assert ran(code) == 2
    finally:
        pool.close()
