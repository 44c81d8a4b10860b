"""``pytest benchmarks/test_layout_perf.py -s``: times of the family "layout", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_layout = performance_test("layout")
