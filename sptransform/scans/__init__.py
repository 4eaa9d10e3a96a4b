"""Recurrences along a dimension, found by what the graph computes."""
