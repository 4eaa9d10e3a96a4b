"""Op-agnostic decisions and checks: axes, propagation, the verifier, and the pass manager."""
