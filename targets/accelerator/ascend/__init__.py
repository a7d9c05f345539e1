"""The same Triton source lowered to Linalg by triton-ascend, in an environment of its own."""
