"""``pytest benchmarks/test_image_perf.py -s``: a test for each case of its family."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_image = performance_test("image")
