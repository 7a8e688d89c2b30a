"""Our attention and KV cache as transformers' attention function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from anychip.errors import Unsupported
from anychip.plugin_api import AttentionBackend, AttentionLayer, ForwardContext

ATTENTION = "anychip"
"""Its name in transformers' registry."""


class AttentionBridge:
    """What a model's attention layers reach from inside the library's code; `context` is the running step's."""

    def __init__(self, layers: list[AttentionLayer], backends: list[AttentionBackend]) -> None:
        self.layers = layers
        self.backends = backends
        self.context: ForwardContext | None = None


def attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Queries and keys come rotated; the cache is written and read by the platform's backend."""
    bridge: AttentionBridge = module.anychip_bridge()  # type: ignore[operator]
    index: int = module.layer_idx  # type: ignore[assignment]
    layer, backend, context = bridge.layers[index], bridge.backends[index], bridge.context
    assert context is not None
    if layer.scale == 0.0:  # the first call
        layer.scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        _check(module, query, key, backend, sliding_window, softcap, others)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return context.attend(backend, layer, q, k, v).unsqueeze(0), None


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    backend: AttentionBackend,
    window: int | None,
    softcap: float | None,
    others: dict[str, Any],
) -> None:
    """What the model's code asks for is what the KV cache was laid out for."""
    spec = backend.spec
    asked = {"heads": query.shape[1], "KV heads": key.shape[1], "head_dim": key.shape[3], "softcap": softcap}
    laid = {
        "heads": spec.num_heads,
        "KV heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "softcap": spec.softcap,
    }
    reasons = [f"{name} {asked[name]}, config.json says {laid[name]}" for name in asked if asked[name] != laid[name]]
    if window != spec.window and window is not None:
        reasons.append(f"a window of {window}, config.json says {spec.window}")
    if window is None and spec.window is not None:
        reasons.append(f"no window, config.json says {spec.window}")
    if not getattr(module, "is_causal", True):
        reasons.append("attention that is not causal")
    extra = [name for name in ("s_aux", "position_bias", "alibi") if others.get(name) is not None]
    if extra:
        reasons.append(f"{', '.join(extra)}, which this path does not pass on")
    if reasons:
        raise Unsupported(f"{type(module).__name__} through transformers", reasons)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The backend knows what each query sees."""


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
