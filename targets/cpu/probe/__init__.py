"""Tries what the installed ONNX Runtime runs right, and how fast."""
