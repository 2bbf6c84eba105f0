"""Measure a model on benchmarks, with confidence intervals, and compare models.

benchmarks -> sampling (vLLM or transformers) -> samples (files) -> grading -> summary -> comparison
"""
