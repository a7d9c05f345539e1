"""Stored formats: each one object, and the codecs that make codes of numbers and numbers of codes."""
