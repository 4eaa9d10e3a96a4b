"""Passes for one mesh dim: placements, redistributes, and local sizes."""
