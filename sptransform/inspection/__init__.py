"""What the compiler does to a model, for people to read."""
