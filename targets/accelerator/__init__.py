"""Accelerators: chips known by a profile, and the kernels that are made for them from it.

chip.py        what a profile holds: memories, matrix units, links, each figure with its grade and source
quantities.py  figures as texts with units, in both directions
profile.py     reading and checking a profile's TOML, and finding one by name
profiles/      one TOML a chip; profile.schema.json says what may stand in them

ops.py, lower.py           the ops of stage kernel, and how a module of stage moe comes to them
tiles.py, tile_expr.py     the tile language: a kernel as a program over tiles that says where each of them lies
builder.py, machine.py     writing such programs for any chip: which memories tiles pass on it
packing.py                 how weights lie in memory and how kernels read them
kernels_*.py               the kernels
simulate.py                executes a tile program and checks what it does against the chip
count.py, predict.py       what a program moves and computes, and how long that takes on a chip
assumed.py                 what predictions take where no source says it
work.py, roofline.py       what each op of a module moves and computes, and how long a step takes on a chip
experts_touched.py         how many experts a step touches
search.py                  the tiles that fit a chip, by predicted time
kinds.py, spec.py          which kernels compute which op; kernels.json
"""
