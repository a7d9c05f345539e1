"""From an exported torch graph to ops of the IR: torch.export, and a handler for each aten operator."""
