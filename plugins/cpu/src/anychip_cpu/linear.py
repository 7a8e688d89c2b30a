"""Products are the reference's: oneDNN behind torch's linear, and quantized weights dequantized before each product.
Packed kernels belong here."""

from anychip.ops.reference import reference_linear

__all__ = ["reference_linear"]
