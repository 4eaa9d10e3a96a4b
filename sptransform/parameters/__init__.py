"""Parameters of which each rank keeps a part."""
