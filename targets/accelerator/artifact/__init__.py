"""What an artifact for an accelerator holds: kernel specs, sources and objects, packed weights, plan, tuning files."""
