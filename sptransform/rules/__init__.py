"""Sharding rules, the tables they stand in, and what a node may be decided to do. Knows no graph."""
