"""What decides and checks, whatever the op: axes, propagation, the verifier, and what runs the passes."""
