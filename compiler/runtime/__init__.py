"""Runs what was compiled, on any target's session: the artifact, text and tokens, and the comparison with the source."""
