"""``pytest benchmarks/test_scan_perf.py -s``: a test for each case of its family."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_scan = performance_test("scan")
