"""``pytest benchmarks/test_loss_perf.py -s``: times of the family "loss", a test a case."""

from __future__ import annotations

from benchmarks.perf import performance_test

test_loss = performance_test("loss")
