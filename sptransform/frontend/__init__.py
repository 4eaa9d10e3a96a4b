"""What users call, and what stands between a module and its compiled graph."""
