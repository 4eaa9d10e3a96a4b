"""Access to a graph: what its nodes compute, what is noted on them, edits, and the printer. Knows no op."""
