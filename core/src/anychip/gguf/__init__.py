"""GGUF, the file of llama.cpp: one file, or numbered pieces of it, with a model's settings, tokenizer and weights.

`header` reads what a file says of itself, `model` joins the pieces and finds them, `metadata` is what they say with
types checked, `families` maps llama.cpp's names to those of the Hugging Face checkpoint that each family reads, and
`config` writes the config.json that the file stands for. `block_types` lists how tensors are stored.

Nothing here reads a weight or builds a tokenizer: weights/gguf_file.py, weights/blocks.py, quantization/gguf.py and
tokenizer/gguf_vocabulary.py do. Nothing in a file is trusted: whatever is wrong with it is a CheckpointError that names
the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""
