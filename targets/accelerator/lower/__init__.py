"""From stage moe to stage kernel: what an accelerator has as one kernel becomes that op, the rest stays as it is."""
