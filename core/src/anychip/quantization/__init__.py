"""Quantization: which scheme each module of a checkpoint has, and how its container's tensors become canonical parts.

detect.py reads config.json; each other file is one container. Arithmetic: ops/reference/quantized.py; the scheme as
kernels see it: plugin_api/quantization.py.
"""
