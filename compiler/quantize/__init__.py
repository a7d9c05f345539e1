"""Which format for which weight: what `--quantize` says, plans, calibration, and the search under a budget."""
