"""The C sources of the kernels: one file an operator, one an instruction set; kernels.h says how data lies in memory."""
