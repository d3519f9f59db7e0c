"""Evaluation: held-out losses with intervals, and code benchmarks whose programs run in isolation."""
