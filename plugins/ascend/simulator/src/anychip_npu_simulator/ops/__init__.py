"""The npu:: ops that are simulated. Each file has a family: what CANN checks, then the computation in host memory."""

from anychip_npu_simulator.ops import attention, cache, elementwise, formats, grouped, moe, quantized, sampling

__all__ = ["attention", "cache", "elementwise", "formats", "grouped", "moe", "quantized", "sampling"]
