"""A model as its costs see it: weights and products of each part, bytes of a token in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from anychip.errors import ConfigError
from anychip.model_config import ModelConfig

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ELEMENT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.53}
"""Of a weight; int4 with the scales of its groups of 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Of one layer. Sizes count weights."""

    count: int
    top_k: int
    each: int
    """Weights of one routed expert."""
    shared: int
    """Weights of those that every token goes through."""
    router: int
    most_groups: int | None
    """A token's experts lie in so many groups at most, where the router is limited so. Groups are taken to be nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes count weights, not bytes, where nothing else is said. `dtype` is that of the weights of products."""

    num_layers: int
    num_dense_layers: int
    """Leading layers with one MLP in place of experts; all of them where there are no experts."""
    hidden_size: int
    attention: int
    """Projections of one layer's attention."""
    dense: int
    """The MLP of one layer without experts."""
    experts: Experts | None
    head: int
    """Of the output head; the embedding is as large."""
    embedding: int
    """0 where it is the head."""
    cache_elements: int
    """What a token keeps in one layer."""
    cache_parts: int
    """Into how many ranks a layer's cache can be divided: its KV heads; 1 for latents, which every rank has whole."""
    score_flops: int
    """Of one query token against one earlier token, in one layer: scores and values."""
    window: int | None
    dtype: str

    @property
    def element_bytes(self) -> float:
        return _ELEMENT_BYTES[self.dtype]


def model_shape(config: ModelConfig, dtype: str = "bfloat16") -> ModelShape:
    """Raises ConfigError for a model whose layers are neither attention nor latent attention, and for an unknown
    `dtype`."""
    if dtype not in _ELEMENT_BYTES:
        raise ConfigError(f"weights of type {dtype!r} are not known; use {', '.join(_ELEMENT_BYTES)}")
    kinds = set(config.get("layer_types") or config.get("layers_block_type") or _kinds_by_settings(config))
    foreign = {kind for kind in kinds if "attention" not in kind or "linear" in kind}
    if not config.num_heads or foreign:
        named = ", ".join(sorted(foreign)) or "layers without attention"
        raise ConfigError(
            f"{config.architecture} has {named}, whose cost is not modelled; simulate a model with attention alone, or "
            "measure this one (anychip bench)"
        )
    experts = _experts(config)
    attention, cache, parts, score = _latent(config) if config.get("kv_lora_rank") else _heads(config)
    vocabulary = config.vocab_size * config.hidden_size
    leading = int(config.get("first_k_dense_replace") or 0)
    return ModelShape(
        num_layers=config.num_layers,
        num_dense_layers=config.num_layers if experts is None else leading,
        hidden_size=config.hidden_size,
        attention=attention,
        dense=3 * config.hidden_size * config.intermediate_size,
        experts=experts,
        head=vocabulary,
        embedding=0 if config.tie_word_embeddings else vocabulary,
        cache_elements=cache,
        cache_parts=parts,
        score_flops=score,
        window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
        dtype=dtype,
    )


def _kinds_by_settings(config: ModelConfig) -> list[str]:
    """Of a family that lists no kinds of layers: some of these keep states beside keys and values."""
    return ["attention", "mamba"] if any(name.startswith("mamba_") for name in config.raw) else ["attention"]


def _heads(config: ModelConfig) -> tuple[int, int, int, int]:
    query, kept = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = config.hidden_size * (2 * query + 2 * kept)
    return projections, 2 * kept, config.num_kv_heads, 4 * query


def _latent(config: ModelConfig) -> tuple[int, int, int, int]:
    """The absorbed form, which decodes: every head scores the latent row itself."""
    heads, hidden = config.num_heads, config.hidden_size
    rank, rope = int(config.need("kv_lora_rank")), int(config.need("qk_rope_head_dim"))
    nope, value = int(config.need("qk_nope_head_dim")), int(config.need("v_head_dim"))
    query_rank = config.get("q_lora_rank")
    query = heads * (nope + rope)
    projections = query_rank * (hidden + query) if query_rank else hidden * query
    projections += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    return projections, rank + rope, 1, 2 * heads * (2 * rank + rope)


def _experts(config: ModelConfig) -> Experts | None:
    count = next((int(config.get(name)) for name in _NUM_EXPERTS if config.get(name)), 0)
    if count < 2:
        return None
    hidden = config.hidden_size
    each = 3 * hidden * int(config.get("moe_intermediate_size") or config.intermediate_size)
    shared = each * int(config.get("n_shared_experts") or 0)
    shared += 3 * hidden * int(config.get("shared_expert_intermediate_size") or 0)
    top_k = int(config.get("num_experts_per_tok") or config.get("num_experts_per_token") or 2)
    groups = config.get("topk_group")
    return Experts(
        count=count,
        top_k=top_k,
        each=each,
        shared=shared,
        router=hidden * count,
        most_groups=int(groups) if groups and groups < int(config.get("n_group") or 0) else None,
    )
