"""Passes that prepare a graph for reading; the result is not trained."""
