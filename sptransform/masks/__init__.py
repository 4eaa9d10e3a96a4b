"""Attention masks as expressions over what has a query dimension and what has a key dimension."""
