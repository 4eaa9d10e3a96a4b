"""Passes for reading a graph, of which no training step comes."""
