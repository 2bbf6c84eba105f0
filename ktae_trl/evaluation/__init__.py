"""How good is a model, how sure is that, and is it better than another one?

benchmarks -> sampling (vLLM or transformers) -> samples (files) -> grading -> summary -> comparison
"""
