"""What of a model goes over several contexts, and what that means for a rank."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.errors import ConfigError, Unsupported
from anychip.layers.context_parallel import is_shared
from anychip.plugin_api import (
    AttentionSpec,
    CacheSpec,
    EncoderSpec,
    KVPlan,
    LatentSpec,
    MeshShape,
    PagedSpec,
    Platform,
)


def check_contexts_of(specs: Sequence[CacheSpec], shape: MeshShape, architecture: str, platform: Platform) -> None:
    """Raises ConfigError for layers whose keys cannot be shared, and for a model that has none to share. Raises
    Unsupported for a device that does not give the log-sum-exp by which ranks merge what they attended to."""
    asked = f"context_parallel_size {shape.cp}"
    reasons = []
    if any(isinstance(spec, LatentSpec) for spec in specs):
        reasons.append(f"{asked}: latent rows (MLA) are kept whole by each rank, and attention over them gives no part")
    if any(isinstance(spec, EncoderSpec) for spec in specs):
        reasons.append(f"{asked}: an encoder keeps nothing that ranks could share")
    if any(isinstance(spec, AttentionSpec) and spec.alibi for spec in specs):
        reasons.append(f"{asked}: ALiBi counts from a query's own key, which one rank alone has")
    if not reasons and not any(map(is_shared, specs)):
        reasons.append(f"{asked}: no layer attends to whole contexts; windows and states are as long with one rank")
    if reasons:
        raise ConfigError(f"{architecture}: {'; '.join(reasons)}; leave it at 1")
    if not platform.capabilities.attention_lse:
        raise Unsupported(
            platform.name,
            [
                f"axis cp of {shape.cp} ranks: its attention does not give the log-sum-exp by which ranks merge what "
                "they attended to; devices whose row attention_lse of the capability matrix says so do"
            ],
        )


def gathered_elements(specs: Sequence[PagedSpec]) -> int:
    """Of a token that the ranks of cp gather in a layer: every head's output, and its log-sum-exp."""
    shared = [spec for spec in specs if isinstance(spec, AttentionSpec) and is_shared(spec)]
    return max((spec.num_heads * (spec.head_dim + 1) for spec in shared), default=0)


def context_note(kv: KVPlan, shape: MeshShape) -> str:
    """For people: what a rank keeps, and what its links carry."""
    shared = [group for group, spec in enumerate(kv.specs) if is_shared(spec)]
    layers = sum(group in shared for group in kv.layer_groups)
    size = next((kv.block_sizes[group] for group in shared), 0) // shape.cp
    nbytes = 4 * gathered_elements(kv.specs) * (shape.cp - 1)
    return (
        f"each of {shape.cp} contexts keeps one of {shape.cp} blocks of {size} tokens; a step receives {nbytes} B a "
        f"token in each of {layers} layers"
    )
