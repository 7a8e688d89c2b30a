"""Limits of a worker's steps, and the shapes of steps that have graphs."""

from __future__ import annotations

from dataclasses import replace

from anychip.config import EngineConfig
from anychip.errors import ConfigError
from anychip.model_config import ModelConfig, rope_parameters
from anychip.plugin_api import ADAPTERS, FINAL, TAPS, GraphLevel, KVPlan, Platform, ShapeKey, ShapePolicy, StepLimits
from anychip.types import cdiv

_GRAPHS_SHARE = 0.1
"""Of the memory that is free before weights are loaded, what graphs may take at most."""


def step_limits(config: EngineConfig, model: ModelConfig, platform: Platform, kv: KVPlan) -> StepLimits:
    """The configuration's limits within the device's. No step has more tokens than its rows may be long."""
    rules = platform.step_rules
    length = config.max_model_len or model.max_positions
    rows = min(config.resolved_max_num_seqs, rules.max_rows or config.resolved_max_num_seqs)
    bounds = (config.resolved_max_num_batched_tokens, rules.max_tokens, rules.max_padded_tokens, rows * length)
    return StepLimits(
        max_num_tokens=min(bound for bound in bounds if bound is not None),
        max_num_reqs=rows,
        max_model_len=length,
        max_slots=config.resolved_max_num_seqs,
        max_pages=tuple(cdiv(length, size) for size in kv.block_sizes),
        # A state that took in a drafted token cannot give it back.
        max_drafts=config.max_drafts if config.speculate is not None and rules.takes_drafts and not kv.states else 0,
        taps=_checked_taps(config, model),
        pools=config.pooling,
        max_embeddings=config.max_embeddings,
        mrope="mrope_section" in rope_parameters(model),
        max_adapters=config.resolved_max_adapters,
        max_adapter_rank=config.resolved_max_adapter_rank if config.resolved_max_adapters else 0,
        segments=bool(kv.encoders) and int(model.get("type_vocab_size") or 0) > 1,
    )


def _checked_taps(config: EngineConfig, model: ModelConfig) -> tuple[int, ...]:
    for layer in config.taps:
        if not FINAL <= layer < model.num_layers:
            raise ConfigError(
                f"taps names layer {layer}; the model has 0 to {model.num_layers - 1}, and {FINAL} for the final norm"
            )
    return config.taps


def affordable_graphs(
    platform: Platform, policy: ShapePolicy, limits: StepLimits, *, always: tuple[str, ...] = ()
) -> list[ShapeKey]:
    """The policy's shapes, as far as graphs of them fit into their share of the free memory. Steps `always` have some
    features. Where there are taps or adapters beyond those, each shape has a graph with them and one without."""
    free = platform.memory(platform.context.device_indexes[0]).free
    graphs = platform.graph_capture()
    keys = policy.keys()
    if always:
        keys = [replace(key, features=always) for key in keys]
    asked = ((TAPS, bool(limits.taps) and TAPS not in always), (ADAPTERS, limits.max_adapters > 0))
    also = [(*always, name) for name, is_asked in asked if is_asked]
    if also and graphs.level >= GraphLevel.FULL:
        keys = [replace(key, features=features) for key in keys for features in (key.features, *also)]
    return list(keys if free is None else graphs.affordable(keys, int(free * _GRAPHS_SHARE)))
