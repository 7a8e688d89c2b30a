"""Compiles step programs for real TPUs where there is none: shapes stand for weights, libtpu compiles, nothing runs.

`anychip tpu-compile` prints what comes of it. Importing this package imports neither torch nor jax.
"""
