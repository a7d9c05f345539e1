"""Parameters, bytes and FLOPs of a program, counted from the IR alone, and how reports show them."""
