"""Imports ONNX models: files of any exporter, and models in memory.

model_file   opens a file, which is not trusted
model        from a model to a module of one function
interface    caches among inputs and outputs, and the sizes that they share
graph        the function while it is written, what its names stand for, local functions inlined
node         a node and its attributes
numbers      sizes, axes and small constants, which are known when compiling
folded       what a graph computes of them
arithmetic, shapes, indexing, layers, attention, contrib, grids
             the operators by subject, each declared once; contrib has those of ONNX Runtime, grids those of moec's own
carried      operators that no ops of the IR stand for, kept as `onnx.node`
"""
