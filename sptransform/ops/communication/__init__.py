"""Communication of the custom ops: collectives, and steps that a process group, a simulation or a tracer drives."""
