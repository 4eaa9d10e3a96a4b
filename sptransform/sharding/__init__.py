"""Sizes, partitions, the four placements, and meshes. Independent of graphs."""
