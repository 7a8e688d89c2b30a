"""Medusa heads: each guesses one token from the final hidden state, all at once. arXiv 2401.10774.

At the hidden state behind which token i + 1 is drawn, the first head says what token i + 2 is, the second token i + 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from anychip.head_config import MedusaConfig
from anychip.layers.build import Builder
from anychip.layers.embedding import LMHead
from anychip.layers.linear import ReplicatedLinear
from anychip.model_config import ModelConfig
from anychip.models.head_parts import HeadFamily, TargetParts, drafted_ids
from anychip.plugin_api import CacheSpec, MeshShape
from anychip.types import DType


class MedusaHeads:
    """`own` are the names of the checkpoint's tensors."""

    def __init__(
        self,
        config: MedusaConfig,
        model: ModelConfig,
        builder: Builder,
        borrowed: TargetParts | None,
        own: frozenset[str],
    ) -> None:
        size, self.num_heads = model.hidden_size, config.num_heads
        self.borrowed = borrowed
        self.blocks = [
            [
                ReplicatedLinear(builder, name=name, in_features=size, out_features=size, bias=f"{name}.bias" in own)
                for name in (f"blocks.{head}.layers.{layer}" for layer in range(config.num_layers))
            ]
            for head in range(config.num_heads)
        ]
        self.outputs: list[LMHead] = []
        if config.own_outputs:
            self.outputs = [
                LMHead(
                    builder, name=f"lm_heads.{head}", vocab_size=config.num_draft_tokens, hidden_size=size, tied=None
                )
                for head in range(config.num_heads)
            ]
        else:
            builder.weights.ignored += ("lm_heads.0.weight",)
        self.ids: Tensor | None = None
        if config.own_outputs and config.num_draft_tokens < model.vocab_size:
            self.ids = drafted_ids(builder, "token_map", config.num_draft_tokens, model.vocab_size, are_offsets=False)
        else:
            builder.weights.ignored += ("token_map",)

    @torch.inference_mode()
    def guesses(self, hidden: Tensor, count: int) -> Tensor:
        """Of final hidden states [num_rows, hidden_size], the tokens behind the one that is drawn there: [num_rows,
        count] ids, `count` at most the number of heads."""
        found = []
        for head in range(count):
            x = hidden
            for layer in self.blocks[head]:
                x = x + silu(layer(x))
            ids = self._logits(head, x).argmax(-1)
            found.append(ids if self.ids is None else self.ids[ids])
        return torch.stack(found, dim=1)

    def _logits(self, head: int, x: Tensor) -> Tensor:
        if self.outputs:
            return self.outputs[head](x)
        assert self.borrowed is not None, "the heads were built without their target, to be measured alone"
        return self.borrowed.logits(x)


class MedusaFamily(HeadFamily):
    """Of Medusa heads, which keep no cache."""

    def __init__(self, config: MedusaConfig, names: frozenset[str]) -> None:
        self.config = config
        self.own = names

    def attention_specs(
        self, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> Sequence[CacheSpec]:
        return ()

    def __call__(self, config: ModelConfig, builder: Builder, specs: Sequence[CacheSpec]) -> MedusaHeads:
        return MedusaHeads(self.config, config, builder, self.target, self.own)
