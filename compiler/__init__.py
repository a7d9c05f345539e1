"""What every part of moec stands on.

ir, dims        the data: modules, functions, ops, types, sizes
recipes         how a weight is made from checkpoint tensors
printer, parser the one text form (grammar.lark)
ops             every op: signature, meaning, cost
verify          the rules of a well-formed module
interpret       runs a module with torch
rewrite         before/after rules
pipeline        runs passes and checks them
weights         reads checkpoints a tile at a time
cost            bytes, FLOPs and parameters from the IR
frontends       sources -> module
driver, cli     the way through, and the command
"""
