"""What custom ops send: collectives, and steps that the process, a simulation or a tracer may drive."""
