"""Which kernels compute an op, and the search for the tiles that a chip runs fastest."""
