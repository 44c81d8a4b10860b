"""``pytest benchmarks/test_indexing_perf.py -s``: times of the family "indexing", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_indexing = performance_test("indexing")
