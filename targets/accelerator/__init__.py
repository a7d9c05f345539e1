"""Accelerator targets: kernels as tile programs, tuned to a chip's profile, with compiled objects where a toolchain is."""
