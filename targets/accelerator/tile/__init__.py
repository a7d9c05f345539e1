"""The tile language: a kernel as a program over tiles that says where each of them lies; its builder, simulator, counts."""
