"""Runs an artifact in ONNX Runtime: the session, its caches, another accuracy for a finished model."""
