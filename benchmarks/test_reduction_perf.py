"""``pytest benchmarks/test_reduction_perf.py -s``: times of the family "reduction", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_reduction = performance_test("reduction")
