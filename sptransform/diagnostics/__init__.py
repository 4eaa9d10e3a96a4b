"""Errors, and what they say of a node."""
