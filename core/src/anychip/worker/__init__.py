"""Runs steps on one rank's devices: opens the platform, loads the model, sizes the cache, keeps request state."""
