"""``pytest benchmarks/test_norm_perf.py -s``: a test for each case of its family."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_norm = performance_test("norm")
