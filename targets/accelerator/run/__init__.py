"""Runs artifacts of accelerators: on a GPU, in Triton's interpreter, or in the simulator, which needs neither.

artifact.py      reading kernels.json, plan.json and the weights of an artifact
launchers.py     what a kernel is launched on
driver.py        compiled objects by the driver of the GPU's vendor
interpreter.py   mends Triton's interpreter
slots.py         states with room for more tokens
executor.py      the ops of a program in their order: kernels by their bindings, other ops by their references
graph.py         steps of one token as a CUDA graph
session.py       start and step, as every target's session has them

Nothing here compiles a program or chooses a kernel.
"""
