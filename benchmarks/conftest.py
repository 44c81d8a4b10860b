"""``pytest benchmarks/test_norm_perf.py -s --mode host``: what is timed (see ``op_timing``)."""

from __future__ import annotations

import pytest

from benchmarks.op_timing import MODES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mode", default="kernel", choices=MODES, help="what of a call is timed")


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--mode"))
