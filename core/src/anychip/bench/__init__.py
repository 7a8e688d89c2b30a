"""`anychip bench`: what an engine or a server does in numbers, the same workload every time."""
