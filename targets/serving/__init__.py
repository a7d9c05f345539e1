"""Planning: what serving a model asks of a system, whether it fits, how it is divided, and how long it takes."""
