"""``pytest benchmarks/test_norm_perf.py -s``: times of the family "norm", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_norm = performance_test("norm")
