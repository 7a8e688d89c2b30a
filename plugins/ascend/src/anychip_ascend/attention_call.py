"""One call of the vendor's fused attention over pages, in TND layout: its arguments by name, for either version of the
op, run at once or into storage that a graph keeps.

Source: the documents of npu_fused_infer_attention_score and _v2 in the torch_npu wheel (`_op_plugin_docs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anychip_ascend.attention_choice import BLOCK_SIZE
from anychip_ascend.runtime import npu

MASK_SIZE = 2048
"""Side of the mask that modes 3 and 4 want, whatever the lengths are."""

_CAUSAL, _BAND = 3, 4
"""sparse_mode: the lower right corner of queries and keys is the last token; a band of `pre_tokens` before it."""


def causal_mask(device: str) -> Tensor:
    """[2048, 2048] bool, True above the diagonal: what is hidden. Made on the host: the device need not know triu."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1).to(device)


@dataclass(slots=True)
class FusedCall:
    """`query_ends` and `key_lengths` are lists on the host, one number to a row: where its queries end, counted from
    the first, of which the last must be the number of query tokens; and its keys, its own tokens included."""

    query: Tensor  # [num_tokens, num_heads, head_dim]
    key: Tensor  # [pages, BLOCK_SIZE, num_kv_heads * head_dim]
    value: Tensor  # as key
    block_table: Tensor  # [num_rows, num_pages] int32
    mask: Tensor
    query_ends: list[int]
    key_lengths: list[int]
    num_heads: int
    num_kv_heads: int
    scale: float
    window: int | None
    sinks: Tensor | None  # [num_heads] bfloat16

    def run(self) -> Tensor:
        """[num_tokens, num_heads, head_dim]"""
        op = npu.npu_fused_infer_attention_score if self.sinks is None else npu.npu_fused_infer_attention_score_v2
        out: Tensor = op(self.query, self.key, self.value, **self._keywords(self.key_lengths))[0]
        return out

    def max_workspace(self) -> Tensor:
        """Scratch memory for the longest rows that the block table can hold: a replay may have those."""
        op = (
            npu._npu_fused_infer_attention_score_get_max_workspace
            if self.sinks is None
            else npu._npu_fused_infer_attention_score_v2_get_max_workspace
        )
        rows, pages = self.block_table.shape
        workspace: Tensor = op(self.query, self.key, self.value, **self._keywords([pages * BLOCK_SIZE] * rows))
        return workspace

    def run_into(self, workspace: Tensor, out: Tensor, lse: Tensor) -> None:
        """As run, into storage that stays. `lse` [0] float32 is what the op gives where nobody asked for it."""
        op = npu.npu_fused_infer_attention_score if self.sinks is None else npu.npu_fused_infer_attention_score_v2
        op.out(
            self.query, self.key, self.value, **self._keywords(self.key_lengths), workspace=workspace, out=[out, lse],
        )  # fmt: skip

    def _keywords(self, key_lengths: list[int]) -> dict[str, Any]:
        band = self.window is not None
        common: dict[str, Any] = {
            "atten_mask": self.mask, "block_table": self.block_table, "num_key_value_heads": self.num_kv_heads,
            "input_layout": "TND", "block_size": BLOCK_SIZE, "sparse_mode": _BAND if band else _CAUSAL,
        }  # fmt: skip
        if self.window is not None:
            # A query sees itself and window - 1 keys before it, and none behind it.
            common |= {"pre_tokens": self.window - 1, "next_tokens": 0}
        if self.sinks is None:
            return {
                **common, "actual_seq_lengths": self.query_ends, "actual_seq_lengths_kv": key_lengths,
                "num_heads": self.num_heads, "scale": self.scale,
            }  # fmt: skip
        return {
            **common, "actual_seq_qlen": self.query_ends, "actual_seq_kvlen": key_lengths,
            "num_query_heads": self.num_heads, "softmax_scale": self.scale, "learnable_sink": self.sinks,
        }  # fmt: skip
