"""The names that `--quantize` and the pass that it runs have for weights and methods."""

ROLES = ("experts", "attention", "shared", "dense", "router", "embedding", "head")  # of weights: see rewrite/roles.py
CALIBRATED = ("gptq", "awq")  # methods that look at the inputs of a weight
