"""Measurements of gems-compile: ``python -m benchmarks.models`` times whole models."""
