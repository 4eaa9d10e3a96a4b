"""The strategies, and their names."""
