"""What a program computes: the interpreter, one that holds no weight whole, and the comparison of two modules."""
