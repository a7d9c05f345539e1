"""Tile programs as Triton source: printed, compiled without a GPU, and what the compiler makes of them."""
