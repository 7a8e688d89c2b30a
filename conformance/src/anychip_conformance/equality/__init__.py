"""Greedy tokens against transformers: tiny seeded checkpoints, a ragged workload, and when a difference is excused."""

VOCAB_SIZE = 512
NUM_LAYERS = 4
HIDDEN_SIZE = 64
"""Of every tiny model."""
