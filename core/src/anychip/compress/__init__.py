"""Makes quantized checkpoints out of plain ones: `anychip quantize`.

targets says what can be made, rounding and gptq find the stored numbers of one matrix, by_layer runs a model a layer at
a time to see what its matrices are fed, writer and checkpoint put the result together, and quality says what it cost.
Reads of quantized checkpoints are quantization/'s.
"""
