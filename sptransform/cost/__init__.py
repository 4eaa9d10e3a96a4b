"""What a training step costs: its ops counted from the final graphs, hardware as data, and a simulation of both."""
