"""Parameters that are sharded over the ranks."""
