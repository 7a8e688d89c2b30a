"""Kernels for TPUs, written in Pallas. Each has a plain form beside it that says what it must compute.

Modules here import jax, except generations and budget, which anyone may read. Nothing here imports torch, except embed,
which puts a jax function into a torch_xla program.
"""
