"""``pytest benchmarks/test_image_perf.py -s``: times of the family "image", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_image = performance_test("image")
