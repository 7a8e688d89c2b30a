"""Speculation on the host: what may follow, how much of it to try, and what came of it. Torch-free."""
