"""From a captured graph to a compiled one: the torch.compile backend."""
