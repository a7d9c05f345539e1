"""The compiler: driver.py runs it from source to artifact. ARCHITECTURE.md says which folder may import which.

ir            what a program is: types, sizes, weights as recipes, modules, and the syntax of their texts
ops           what each op means and costs, and the rules of a well-formed module
formats       quantized storage: numbers to codes and back
text          programs to text and back
weights       reads checkpoints and evaluates recipes, a tile at a time
cost          parameters, bytes and FLOPs, counted from the IR
artifact      what is on disk: the manifest, and folders that appear whole or not at all
check         runs a module with torch, and compares two of them
rewrite       how passes change programs, and the runner that checks them
frontends     sources -> module
quantize      which format for which weight
runtime       runs what was compiled, and compares it with the source model
cli           the `moec` command
"""
