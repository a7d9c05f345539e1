"""How checkpoints store weights: one tensor, or codes with scales and zero points in one of many layouts."""
