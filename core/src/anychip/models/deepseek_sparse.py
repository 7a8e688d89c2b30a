"""DeepSeek V3.2 and GLM-5: DeepSeek V3 with queries that choose the tokens they attend to (config.json:
DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM).

GLM-5 rotates neighbours in its index keys, and some of its layers attend to what a layer before them has chosen.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from anychip.errors import CheckpointError
from anychip.layers.build import Builder
from anychip.layers.indexer import Indexer
from anychip.model_config import ModelConfig
from anychip.models.deepseek import DeepseekV3
from anychip.plugin_api import LatentSpec, MeshShape, Rope
from anychip.types import DType

_KINDS = {"F": "full", "S": "shared"}


class DeepseekV32(DeepseekV3):
    @classmethod
    def attention_specs(cls, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType) -> list[LatentSpec]:
        """One spec for all layers, so that their pages match; a layer that chooses nothing leaves its keys unused."""
        dim, top_k = int(config.need("index_head_dim")), int(config.need("index_topk"))
        dense = super().attention_specs(config, shape, dtype, kv_dtype)
        return [replace(spec, index_dim=dim, top_k=top_k) for spec in dense]

    @property
    def interleaved(self) -> bool:
        return True

    @property
    def index_interleaved(self) -> bool:
        """Whether pairs that are rotated in index keys are neighbours."""
        return False

    def chooses(self, index: int) -> bool:
        """Whether a layer chooses; others attend to what the last one that did has chosen."""
        return True

    def indexer(self, builder: Builder, index: int, rope: Rope) -> Indexer | None:
        if not self.chooses(index):
            return None
        config = self.config
        return Indexer(
            builder,
            name=f"model.layers.{index}.self_attn.indexer",
            hidden_size=config.hidden_size,
            query_rank=int(config.need("q_lora_rank")),
            num_heads=int(config.need("index_n_heads")),
            dim=int(config.need("index_head_dim")),
            rope=replace(rope, interleaved=self.index_interleaved),
        )


class GlmMoeDsa(DeepseekV32):
    @property
    def index_interleaved(self) -> bool:
        return True

    @cached_property
    def _choosing(self) -> list[str]:
        return indexer_types(self.config)

    def chooses(self, index: int) -> bool:
        return self._choosing[index] == "full"


def indexer_types(config: ModelConfig) -> list[str]:
    """ "full" or "shared" for each layer: listed; or a pattern of F and S; or every `index_topk_freq`-th layer behind
    the first `index_skip_topk_offset`. Raises CheckpointError for what no layer could attend by."""
    given = config.get("indexer_types") or config.get("index_topk_pattern")
    if given is None:
        every, skipped = max(1, int(config.get("index_topk_freq", 1))), int(config.get("index_skip_topk_offset", 2))
        given = ["FS"[max(layer - skipped + 1, 0) % every != 0] for layer in range(config.num_layers)]
    kinds = [_KINDS.get(kind, kind) for kind in given]
    if len(kinds) != config.num_layers or kinds[0] != "full" or set(kinds) - set(_KINDS.values()):
        raise CheckpointError(
            f"{config.folder}/config.json: indexer_types are {kinds}; expected full or shared for each of "
            f"{config.num_layers} layers, and full for the first"
        )
    return kinds
