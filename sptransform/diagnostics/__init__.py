"""Errors, and how their messages locate a node."""
