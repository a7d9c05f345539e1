"""Imports GGUF files: llama.cpp's names for weights, and a config made of the metadata."""
