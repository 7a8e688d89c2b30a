"""Quantizes a checkpoint's weights as they are loaded, keeps keys and values in fp8, and says what that saves.

python examples/quantize.py [MODEL]
"""

from __future__ import annotations

import sys

from anychip import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
    sampling = SamplingParams(temperature=0, max_tokens=16)
    for quantization, kv_cache_dtype in ((None, "auto"), ("int8", "fp8"), ("int4", "fp8")):
        with LLM(model, quantization=quantization, kv_cache_dtype=kv_cache_dtype, num_kv_blocks=512) as llm:
            memory = llm.worker.memory
            text = llm.generate("def add(a, b):", sampling)[0].outputs[0].text
            print(
                f"--- {quantization or 'as stored'}: weights {memory.weights >> 20} MiB, KV {memory.kv_cache >> 20} MiB"
            )
            print(text)


if __name__ == "__main__":
    main()
