"""``pytest benchmarks/test_scan_perf.py -s``: times of the family "scan", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_scan = performance_test("scan")
