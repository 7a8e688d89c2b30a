"""Dense products are the reference's: oneDNN behind torch's linear. Packed and quantized kernels belong here."""

from anychip.ops.reference import ReferenceLinear

__all__ = ["ReferenceLinear"]
