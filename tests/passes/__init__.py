"""One test file a pass."""
