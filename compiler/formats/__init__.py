"""Quantized storage: numbers to the codes of a format and back, and the blocks of GGUF."""
