"""Accelerators: chips known by a profile, data that says what a tiling search and a cost model need of them.

chip.py        what a profile holds: memories, matrix units, links, each figure with its grade and source
quantities.py  figures as texts with units, in both directions
profile.py     reading and checking a profile's TOML, and finding one by name
profiles/      one TOML a chip; profile.schema.json says what may stand in them
"""
