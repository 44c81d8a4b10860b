"""``pytest benchmarks/test_product_perf.py -s``: times of the family "product", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_product = performance_test("product")
