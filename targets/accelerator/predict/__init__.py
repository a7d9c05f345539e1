"""How long kernels, ops and steps take on a chip, from what they move and compute."""
