"""Ops of stage kernel as ONNX nodes, model.onnx with its data file, and genai_config.json."""
