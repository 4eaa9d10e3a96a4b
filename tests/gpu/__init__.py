"""What a CUDA device has to show. `make gpu` prints it, and the tests marked `cuda` are the same checks."""
