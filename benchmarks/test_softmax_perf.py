"""``pytest benchmarks/test_softmax_perf.py -s``: times of the family "softmax", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_softmax = performance_test("softmax")
