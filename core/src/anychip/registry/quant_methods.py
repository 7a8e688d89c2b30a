"""The containers of quantized checkpoints that core reads, listed beside what packages bring: anychip.quantization has
them."""

METHODS = {
    "gptq": "anychip.quantization.gptq:GPTQ",
    "awq": "anychip.quantization.awq:AWQ",
    "fp8": "anychip.quantization.fp8:FP8",
    "mxfp4": "anychip.quantization.mxfp4:MXFP4",
    "gguf": "anychip.quantization.gguf:GGUF",
    "modelopt": "anychip.quantization.modelopt:ModelOpt",
    "bitsandbytes": "anychip.quantization.bitsandbytes:BitsAndBytes",
    "hqq": "anychip.quantization.hqq:HQQ",
    "quark": "anychip.quantization.quark:Quark",
    "auto-round": "anychip.quantization.autoround:AutoRound",
    "compressed-tensors": "anychip.quantization.compressed_tensors:CompressedTensors",
}
"""By quantization_config.quant_method: the dotted class of a WeightFormat, made from that object and the names of the
checkpoint's tensors."""

REFUSED = {
    "aqlm": "a code stands for eight weights at once, as a sum of vectors; schemes here have a code for each weight",
    "vptq": "a code stands for several weights at once; schemes here have a code for each weight",
    "higgs": "weights are stored rotated, and activations are not rotated here",
    "spqr": "outliers lie apart from the matrix, in a sparse one",
}
"""Methods that core knows and does not read, and why."""
