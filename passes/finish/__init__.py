"""Passes on the graph of one rank, once all mesh dims are distributed."""
