"""``pytest benchmarks/test_pointwise_perf.py -s``: times of the family "pointwise", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_pointwise = performance_test("pointwise")
