"""Sizes, who owns which indices, the four placements, and meshes. Knows no graph."""
