"""Accelerators: chips known by a profile, and the kernels that are made for them from it.

chip       profiles as data: memories, matrix units, links, each figure with its grade and source
ops, lower the ops of stage kernel, and how a module of stage moe comes to them
tile       the tile language: builder, simulator, counts, how weights lie in memory
kernels    the kernels, written once for any chip
predict    how long kernels, ops and steps take
triton     Triton source of a program, compiled without a GPU
ascend     the same source lowered to Linalg by triton-ascend
select     which kernels compute which op, with which tiles
artifact   kernel specs, packed weights, plan, tuning files
run        running the kernels
target     the target as the driver sees it
"""
