"""Attention masks as expressions over tensors that have a query dimension or a key dimension."""
