"""Greedy tokens against transformers: tiny seeded checkpoints, a ragged workload, and when a difference is excused."""
