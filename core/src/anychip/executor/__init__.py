"""Carries steps from the engine to the workers and back. Knows no tensors: a worker is handed to it."""
