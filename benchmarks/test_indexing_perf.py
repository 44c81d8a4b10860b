"""``pytest benchmarks/test_indexing_perf.py -s``: a test for each case of its family."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_indexing = performance_test("indexing")
