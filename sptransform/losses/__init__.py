"""Losses of logits, read from the graph."""
