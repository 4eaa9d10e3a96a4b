"""Access to a graph: what its nodes compute, notes on nodes, edits, and the printer. Op-agnostic."""
