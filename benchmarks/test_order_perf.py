"""``pytest benchmarks/test_order_perf.py -s``: a test for each case of its family."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_order = performance_test("order")
