"""Which tokens end a text. Files name one or two of them; llama.cpp knows the others by how they are written, and so
must whoever serves its files."""

from __future__ import annotations

from anychip.gguf.metadata import Metadata

CONTROL = 3
"""tokenizer.ggml.token_type of tokens that are no text."""

_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_WRITTEN = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
        "<|eom_id|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "< EOT >",
    }
)  # fmt: skip
_HARMONY = frozenset({"<|return|>", "<|call|>"})
"""Where a vocabulary has both, <|end|> ends a message and not the answer."""


def end_token_ids(metadata: Metadata) -> list[int]:
    """In ascending order, those of the metadata and control tokens that are written as ends."""
    tokens = metadata.texts("tokenizer.ggml.tokens") or []
    found = {value for key in _KEYS if (value := metadata.integer(f"tokenizer.ggml.{key}")) is not None}
    kinds = metadata.numbers("tokenizer.ggml.token_type")
    if kinds is not None:
        control = {token: id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL}
        written = _WRITTEN - ({"<|end|>"} if control.keys() >= _HARMONY else frozenset())
        found |= {id for token, id in control.items() if token in written}
    return sorted(id for id in found if 0 <= id < len(tokens))
