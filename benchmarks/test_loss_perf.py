"""``pytest benchmarks/test_loss_perf.py -s``: a test for each case of its family."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_loss = performance_test("loss")
