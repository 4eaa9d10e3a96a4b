"""Rows in an order that data says: where it begins, what is known about it, and how it is undone."""
