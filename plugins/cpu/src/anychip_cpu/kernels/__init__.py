"""Compiled kernels of this plugin: none yet."""
