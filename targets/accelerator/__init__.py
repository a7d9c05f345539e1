"""Accelerators: kernels as tile programs, tuned to a chip's profile, with compiled objects where a toolchain is.

chip.py        what a profile holds: memories, matrix units, links, each figure with its grade and source
quantities.py  figures as texts with units, in both directions
profile.py     reading and checking a profile's TOML, and finding one by name
profiles/      one TOML a chip; profile.schema.json says what may stand in them
ops.py         the ops of stage kernel; lower.py gets there from stage moe
tiles.py       the tile language, with tile_expr.py, builder.py and simulate.py
packing.py     how a weight lies in device memory; shards.py writes it so
emit.py        the artifact; target.py is what the driver sees
"""
