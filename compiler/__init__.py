"""What every part of moec stands on.

ir, dims, dtypes      the data: modules, functions, ops, types, sizes
recipes               how a weight is made from checkpoint tensors
printer, parser       the one text form (grammar.lark); syntax and fragments are its parts
ops                   every op: signature, meaning, cost
verify                the rules of a well-formed module
interpret             runs a module with torch
rewrite, patterns     before/after rules
routing               reads a router backwards, for the pass that fuses it
pipeline, check       runs passes, and compares the numbers before and after
weights               reads checkpoints a tile at a time
quantization, plan    what --quantize says, and quantization.json; roles say what a weight is for
calibrate, tiled      a program on a text in little memory; sensitivity and allocate choose formats with it, planning
                      is where the driver asks for that
awq, expert_groups    what the pass quantize does to a function besides storing its weights
cost, report          bytes, FLOPs and parameters from the IR; what `moec inspect` says
frontends             sources -> module
artifact, manifest    the finished folder; atomic puts it in place
generate, tokenizer   text and tokens from an artifact
parity, reference     an artifact against its source model
driver, cli           the way through, and the command
"""
