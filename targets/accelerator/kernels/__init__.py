"""The kernels, each written once as a tile program for any chip."""
