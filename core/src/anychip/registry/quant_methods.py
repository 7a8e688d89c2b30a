"""The containers of quantized checkpoints that core reads, listed beside what packages bring: anychip.quantization has
them."""

METHODS = {
    "gptq": "anychip.quantization.gptq:GPTQ",
    "awq": "anychip.quantization.awq:AWQ",
    "fp8": "anychip.quantization.fp8:FP8",
    "mxfp4": "anychip.quantization.mxfp4:MXFP4",
    "gguf": "anychip.quantization.gguf:GGUF",
    "modelopt": "anychip.quantization.modelopt:ModelOpt",
    "compressed-tensors": "anychip.quantization.compressed_tensors:CompressedTensors",
}
"""By quantization_config.quant_method: the dotted class of a WeightFormat, made from that object and the names of the
checkpoint's tensors."""
