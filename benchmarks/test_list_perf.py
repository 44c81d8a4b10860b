"""``pytest benchmarks/test_list_perf.py -s``: a test for each case of its family."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_list = performance_test("list")
