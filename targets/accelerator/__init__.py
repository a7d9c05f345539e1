"""Accelerators: chips known by a profile, and the kernels that are made for them from it.

chip.py        what a profile holds: memories, matrix units, links, each figure with its grade and source
quantities.py  figures as texts with units, in both directions
profile.py     reading and checking a profile's TOML, and finding one by name
profiles/      one TOML a chip; profile.schema.json says what may stand in them

ops.py, lower.py, formats.py     the ops of stage kernel, how a module of stage moe comes to them, the formats of weights
tiles.py, tile_expr.py           the tile language: a kernel as a program over tiles that says where each of them lies
builder.py, machine.py           writing such programs for any chip: which memories tiles pass on it
packing.py                       how weights lie in memory and how kernels read them
kernels_*.py, attend.py          the kernels; exchange.py, kernels_comm.py: rows between devices
simulate.py                      executes a tile program and checks what it does against the chip
count.py, predict.py             what a program moves and computes, and how long that takes on a chip
assumed.py, experts_touched.py   what predictions take where no source says it; how many experts a step touches
work.py, roofline.py, predicted.py   the same for each op of a whole module
choices.py, search.py            what may be chosen of a kernel; the tiles that fit a chip, by predicted time
kinds*.py, supported.py, spec.py     which kernels compute which op; kernels.json
triton_*.py, objects.py, launch.py   Triton source of a program, compiled without a GPU, what it takes; running it on one
ascend*.py                       the same source lowered to Linalg by triton-ascend, in an environment of its own
engine_files.py                  tuning files of vLLM and SGLang
shards.py, plan.py, emit.py, target.py   packed weights, where they go, the artifact, the target
"""
