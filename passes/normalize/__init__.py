"""Passes on the captured graph: what one device computes, in the form that rules read best."""
