"""Sharding rules, the tables that hold them, and the decisions a node may get. Independent of graphs."""
