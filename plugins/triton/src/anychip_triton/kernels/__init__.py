"""Triton kernels, one family a module. They call nothing of a vendor's: what differs between targets are tiles."""
