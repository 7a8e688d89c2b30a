"""The arguments of npu_fused_infer_attention_score and of its second version, which has other names for them.

layout   query                          lengths of queries
BSH      [batch, S, heads * dim]        each row's
BSND     [batch, S, heads, dim]         each row's
BNSD     [batch, heads, S, dim]         each row's
TND      [tokens, heads, dim]           cumulative, the last is the number of tokens
paged    key, value [num_blocks, block_size, kv_heads * dim] or [num_blocks, kv_heads, block_size, dim]; lengths of
         keys are each row's, in any layout
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anychip_npu_simulator.calls import Arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How a version of the op calls its arguments."""

    heads: str
    query_lengths: str
    kv_lengths: str
    lse: str
    unsupported: tuple[str, ...]
    """What the simulator does not have: quantized caches, padding on the left, shared prefixes."""


V1 = Names(
    heads="num_heads",
    query_lengths="actual_seq_lengths",
    kv_lengths="actual_seq_lengths_kv",
    lse="softmax_lse_flag",
    unsupported=(
        "pse_shift", "dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2",
        "antiquant_scale", "antiquant_offset", "key_antiquant_scale", "key_antiquant_offset", "value_antiquant_scale",
        "value_antiquant_offset", "query_padding_size", "kv_padding_size", "key_shared_prefix", "value_shared_prefix",
        "actual_shared_prefix_len", "key_rope_antiquant_scale",
    ),
)  # fmt: skip
V2 = Names(
    heads="num_query_heads",
    query_lengths="actual_seq_qlen",
    kv_lengths="actual_seq_kvlen",
    lse="return_softmax_lse",
    unsupported=(
        "pse_shift", "dequant_scale_query", "dequant_scale_key", "dequant_offset_key", "dequant_scale_value",
        "dequant_offset_value", "dequant_scale_key_rope", "quant_scale_out", "quant_offset_out", "quant_scale_p",
    ),
)  # fmt: skip


def lengths(a: Arguments, name: str) -> list[int] | None:
    values = getattr(a, name)
    return None if values is None else [int(value) for value in values]


def kv_heads(a: Arguments, names: Names) -> int:
    return int(a.num_key_value_heads or getattr(a, names.heads))


def query_dim(a: Arguments, names: Names) -> int:
    heads, shape = int(getattr(a, names.heads)), tuple(a.query.shape)
    if a.input_layout == "BSH":
        a.check(shape[2] % heads == 0, "query", f"of shape {shape}", f"a last dimension of {heads} heads")
        return shape[2] // heads
    place = {"BSND": 2, "BNSD": 1, "TND": 1}[a.input_layout]
    a.check(
        shape[place] == heads, names.heads, heads, f"{shape[place]}, as query of shape {shape} has in {a.input_layout}"
    )
    return shape[-1]


def row_lengths(a: Arguments, names: Names) -> Sequence[int]:
    """Queries of each row."""
    given = lengths(a, names.query_lengths)
    if a.input_layout == "TND":
        assert given is not None
        return [high - low for low, high in zip([0, *given], given, strict=False)]
    batch, size = a.query.shape[0], a.query.shape[2] if a.input_layout == "BNSD" else a.query.shape[1]
    if given is None or size == 1:
        return [size] * batch
    return given * batch if len(given) == 1 else given
