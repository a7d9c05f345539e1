"""What recipes read from: safetensors folders, GGUF files, tensors in memory, pseudo-random numbers."""
