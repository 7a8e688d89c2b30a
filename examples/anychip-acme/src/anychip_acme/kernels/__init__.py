"""Your kernels."""
