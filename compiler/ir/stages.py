"""The stages of a program, in order."""

STAGES = ("graph", "moe", "kernel")
