"""From stage moe to stage kernel: what ONNX Runtime has as one op becomes that op."""
