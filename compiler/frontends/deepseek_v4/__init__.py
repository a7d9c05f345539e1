"""DeepSeek-V4, built from its config and tensors: traced, it would hold for some lengths of the prompt only."""
