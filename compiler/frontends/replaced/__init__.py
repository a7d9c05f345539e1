"""Code of transformers that cannot be traced, and what stands for it while a model is imported."""
