"""Imports ONNX models: files of any exporter, and models in memory.

model_file   opens a file, which is not trusted
model        from a model to a module of one function
graph        the function while it is written, what its names stand for, local functions inlined
numbers      sizes and axes that a graph computes of shapes, folded while it is read
arithmetic   the operators by subject, each declared once
shapes
indexing
layers
carried      operators that no ops of the IR stand for, kept as `onnx.node`
"""
