"""Decides which request computes how many tokens in the next step. Knows no tensors and no device by name."""
