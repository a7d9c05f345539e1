"""moec's own kernels for ONNX Runtime: C sources, what compiles them, and the nodes of a model that they compute."""
