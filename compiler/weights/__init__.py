"""Weights: from the tensors of a checkpoint to the bytes of an artifact, a tile at a time.

safetensors_header  reads and checks the header of one `.safetensors` file (no torch)
checkpoint          a folder of shards: `open_checkpoint`, `Checkpoint.read`
sources             what a recipe reads from: `WeightSource`, `ModuleSource`, `RandomSource`
steps               the steps of recipes, each declared once with its type and its evaluation; `step` makes one
evaluate            evaluates a recipe for a box of its result: `evaluate_recipe`, `tile_boxes`
kept_codes          the codes of a checkpoint that a weight can be stored with
sink                the streamed data file: `DataFile`
"""
