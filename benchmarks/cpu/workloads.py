"""What is asked of every engine: fixed seeds, token ids that every model's vocabulary has, greedy, no early end.

a) one stream: 128 tokens in, 128 out · b) 16 ragged requests at once, 64 to 256 in, 32 to 128 out · c) 16 requests that
share 512 tokens and have 32 of their own, 32 out · d) one prompt of 2,048 tokens, 1 out · e) one stream: 32 tokens in,
32 out · f) 16 requests at once, 32 in, 32 out each: one length, so that an engine without ragged batches pads nothing ·
edit-8, extract-1, chat-32 and their like) so many of repeating.py's prompts at once, by the model's own tokenizer
"""

from __future__ import annotations

import random
from pathlib import Path

import repeating

Request = tuple[list[int], int]
"""A prompt's token ids, and the tokens to write."""

NAMES = ("a", "b", "c", "d", "e", "f")


def requests(name: str, seed: int, model: str = "") -> list[Request]:
    """`model` is the folder of a tokenizer, for workloads that are texts."""
    work, _, streams = name.partition("-")
    if streams:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        texts = repeating.prompts(work, int(streams), first=seed * int(streams))
        return [(tokenizer.encode(text).ids, repeating.TOKENS) for text in texts]
    rng = random.Random(f"{name}{seed}")
    if name == "b":
        return [(ids(rng, rng.randint(64, 256)), rng.randint(32, 128)) for _ in range(16)]
    if name == "c":
        shared = ids(rng, 512)
        return [(shared + ids(rng, 32), 32) for _ in range(16)]
    if name in ("e", "f"):
        return [(ids(rng, 32), 32) for _ in range(16 if name == "f" else 1)]
    return [(ids(rng, 128), 128)] if name == "a" else [(ids(rng, 2048), 1)]


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 31000) for _ in range(count)]
