"""anychip or llama.cpp with a GGUF file, in a process of its own that gguf.py drives by lines of JSON.

python benchmarks/cpu/gguf_engine.py anychip|llama MODEL.gguf THREADS DTYPE [TOKENS]

One line says what starting took; then each line read asks for one thing, and is answered by one. Seconds are of the
clock, processor seconds of all threads. TOKENS is what anychip's KV cache holds. Finds `llama_cpp` on PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

MOST_TOKENS = 2560
STREAMS = 4
"""At once at most: each has a table as long as the vocabulary."""
SECOND = 2
"""Likeliest tokens of which the log-probability is told."""


class Anychip:
    def __init__(self, model: str, threads: int, dtype: str, most: int) -> None:
        from anychip import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            model, device="cpu", dtype=dtype, skip_tokenizer=True, max_model_len=most, prefix_caching=False,
            num_kv_blocks=most // 16 + 2, max_num_seqs=STREAMS, device_options={"threads": str(threads)},
        )  # fmt: skip

    def write(self, tokens: list[int], count: int) -> list[dict[str, Any]]:
        """Greedy tokens: each with its lead over the second, and the second."""
        params = self._params(temperature=0, max_tokens=count, ignore_eos=True, logprobs=SECOND)
        (output,) = self._llm.generate([tokens], params)
        sequence = output.outputs[0]
        return [
            {"token": token, "lead": at.top[0] - at.top[1], "second": at.top_ids[1]}
            for token, at in zip(sequence.token_ids, sequence.logprobs, strict=True)
        ]

    def run(self, tokens: list[int], count: int) -> None:
        self._llm.generate([tokens], self._params(temperature=0, max_tokens=count, ignore_eos=True))

    def score(self, tokens: list[int]) -> list[float]:
        """Log-probabilities of all but the first."""
        params = self._params(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
        (output,) = self._llm.generate([tokens], params)
        return [at.chosen for at in output.prompt_logprobs]


class Llama:
    def __init__(self, model: str, threads: int, dtype: str, most: int) -> None:
        import llama_cpp

        self._c = c = llama_cpp.llama_cpp
        self._quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._quiet, ctypes.c_void_p(0))
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = most, most, threads, threads
        self._context = c.llama_init_from_model(self._model, params)
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))

    def encode(self, text: str) -> list[int]:
        c, data = self._c, text.encode()
        held = (c.llama_token * (len(data) + 8))()
        vocabulary = c.llama_model_get_vocab(self._model)
        return list(held[: c.llama_tokenize(vocabulary, data, len(data), held, len(held), True, False)])

    def _decode(self, tokens: list[int], first: int, all_logits: bool = False) -> Any:
        """Logits [positions, vocabulary] of the last token, or of all."""
        import numpy as np

        c = self._c
        batch = c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, first + at, 1, 0
            batch.logits[at] = all_logits or at == len(tokens) - 1
        assert c.llama_decode(self._context, batch) == 0
        c.llama_batch_free(batch)
        rows = len(tokens) if all_logits else 1
        held = c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(held, shape=(rows, self._vocabulary))

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def write(self, tokens: list[int], count: int) -> list[dict[str, Any]]:
        self._clear()
        logits, found, at = self._decode(tokens, 0), [], len(tokens)
        for number in range(count):
            best, second = logits[-1].argpartition(-2)[: -SECOND - 1 : -1]
            if logits[-1, best] < logits[-1, second]:
                best, second = second, best
            lead = float(logits[-1, best] - logits[-1, second])
            found.append({"token": int(best), "lead": lead, "second": int(second)})
            if number + 1 < count:
                logits, at = self._decode([int(best)], at), at + 1
        return found

    def run(self, tokens: list[int], count: int) -> None:
        self._clear()
        logits = self._decode(tokens, 0)
        for number in range(count - 1):
            logits = self._decode([int(logits[-1].argmax())], len(tokens) + number)

    def score(self, tokens: list[int]) -> list[float]:
        import numpy as np

        self._clear()
        wide = self._decode(tokens, 0, all_logits=True)[:-1].astype(np.float64)
        most = wide.max(axis=1, keepdims=True)
        total = most[:, 0] + np.log(np.exp(wide - most).sum(axis=1))
        return [float(wide[at, token] - total[at]) for at, token in enumerate(tokens[1:])]


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def resident(field: str = "VmRSS") -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    name, model, threads, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    most = int(sys.argv[5]) if len(sys.argv) > 5 else MOST_TOKENS
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kind = Anychip if name == "anychip" else Llama
    __import__("anychip.launch" if name == "anychip" else "llama_cpp")

    def timed(fn: Any, *arguments: Any) -> dict[str, Any]:
        began, used = time.perf_counter(), processor_seconds()
        result = fn(*arguments)
        return {
            "result": result, "seconds": time.perf_counter() - began, "processor_s": processor_seconds() - used,
            "resident": resident(), "most_resident": resident("VmHWM"),
        }  # fmt: skip

    def start() -> None:
        nonlocal engine
        engine = kind(model, threads, dtype, most)
        engine.run([1, 2, 3], 2)  # a file that is mapped is read now

    engine: Any = None
    print(json.dumps(timed(start)), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(timed(getattr(engine, asked[0]), *asked[1:])), file=answers, flush=True)


if __name__ == "__main__":
    main()
