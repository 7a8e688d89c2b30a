"""GGUF files of known shapes with random blocks, for what does not depend on a model's sense.

python benchmarks/cpu/gguf_models.py FOLDER

M2-Q4_K_M.gguf: Llama-3.2-1B as llama.cpp's quantizer mixes types. tiny.gguf: next to nothing, whose process is what
others are measured above.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

Shape = dict[str, int]
M2: Shape = {"vocabulary": 128256, "hidden": 2048, "middle": 8192, "layers": 16, "heads": 32, "kv_heads": 8}
TINY: Shape = {"vocabulary": 256, "hidden": 256, "middle": 256, "layers": 1, "heads": 4, "kv_heads": 2}


def finer(layer: int, layers: int) -> bool:
    """Whether Q4_K_M keeps a layer's values and second feed-forward matrix in six bits."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensors(shape: Shape) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    hidden, middle = shape["hidden"], shape["middle"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    yield "token_embd.weight", "Q6_K", (shape["vocabulary"], hidden)
    yield "output_norm.weight", "F32", (hidden,)
    for layer in range(shape["layers"]):
        upper = "Q6_K" if finer(layer, shape["layers"]) else "Q4_K"
        for name, kind, extents in (
            ("attn_norm", "F32", (hidden,)), ("attn_q", "Q4_K", (hidden, hidden)), ("attn_k", "Q4_K", (kv, hidden)),
            ("attn_v", upper, (kv, hidden)), ("attn_output", "Q4_K", (hidden, hidden)), ("ffn_norm", "F32", (hidden,)),
            ("ffn_gate", "Q4_K", (middle, hidden)), ("ffn_up", "Q4_K", (middle, hidden)),
            ("ffn_down", upper, (hidden, middle)),
        ):  # fmt: skip
            yield f"blk.{layer}.{name}.weight", kind, extents


def blocks(rng: np.random.Generator, kind: str, extents: tuple[int, ...]) -> np.ndarray:
    """Any codes, and scales so small that nothing overflows."""
    if kind == "F32":
        return np.ones(extents, np.float32)
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = extents[0] * extents[1] // size
    held = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for place in (208,) if kind == "Q6_K" else (0, 2):
        halves = np.full(count, 1e-5 if kind == "Q6_K" else 5e-5, np.float16)
        held[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return held.reshape(extents[0], -1)


def write(path: Path, shape: Shape) -> Path:
    rng = np.random.default_rng(7)
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(shape["layers"])
    file.add_context_length(8192)
    file.add_embedding_length(shape["hidden"])
    file.add_feed_forward_length(shape["middle"])
    file.add_head_count(shape["heads"])
    file.add_head_count_kv(shape["kv_heads"])
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(500000.0)
    file.add_rope_dimension_count(shape["hidden"] // shape["heads"])
    file.add_vocab_size(shape["vocabulary"])
    file.add_tokenizer_model("none")
    for name, kind, extents in tensors(shape):
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        file.add_tensor(name, blocks(rng, kind, extents), raw_dtype=raw)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def main() -> None:
    folder = Path(sys.argv[1])
    for name, shape in (("M2-Q4_K_M.gguf", M2), ("tiny.gguf", TINY)):
        if not (folder / name).exists():
            print(write(folder / name, shape))


if __name__ == "__main__":
    main()
