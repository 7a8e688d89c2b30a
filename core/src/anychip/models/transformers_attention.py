"""Our attention and KV cache as transformers' attention function, and a recorder of what a model's code asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from anychip.errors import Unsupported
from anychip.plugin_api import AttentionBackend, AttentionLayer, ForwardContext

ATTENTION = "anychip"
"""Its name in transformers' registry."""

_NOT_PASSED_ON = ("position_bias", "alibi", "block_mask", "indices", "topk_indices", "attention_bias", "r_states")
"""Arguments of other implementations that change scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What the model's code asks for in one call of a forward pass, on one rank that holds all heads. `layer` is the
    library's number of the layer, where it has one."""

    module: str
    layer: int | None
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    softcap: float | None
    sinks: bool
    alibi: bool

    @property
    def head_dim(self) -> int:
        """Of the cache: shorter keys or values are padded with zeros."""
        return max(self.key_dim, self.value_dim)


class Attends(Protocol):
    """What a model's attention layers reach from inside the library's code."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # [1, num_heads, num_tokens, key_dim]
        key: Tensor,  # [1, num_kv_heads, num_tokens, key_dim]
        value: Tensor,  # [1, num_kv_heads, num_tokens, value_dim]
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        """[1, num_tokens, num_heads, value_dim]"""
        ...


class AttentionRecorder:
    """Stands in where only the calls of a forward pass are wanted: answers zeros."""

    def __init__(self, names: dict[int, str]) -> None:
        """`names`: of the model's modules, by identity."""
        self.calls: list[AttentionCall] = []
        self._names = names

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        layer = getattr(module, "layer_idx", None)
        self.calls.append(
            AttentionCall(
                module=self._names[id(module)],
                layer=layer if isinstance(layer, int) else None,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                key_dim=key.shape[3],
                value_dim=value.shape[3],
                window=window,
                softcap=softcap,
                sinks=sinks is not None,
                alibi=alibi_slopes is not None,
            )
        )
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))


class AttentionBridge:
    """The n-th call of a forward pass has the n-th cache, whichever module makes it."""

    def __init__(self, layers: Sequence[AttentionLayer], backends: list[AttentionBackend], rank: int) -> None:
        """`rank`: along tp, of the heads that are held here."""
        self.layers = layers
        self.backends = backends
        self._rank = rank
        self._context: ForwardContext | None = None
        self._next = 0

    def begin(self, context: ForwardContext) -> None:
        self._context = context
        self._next = 0

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        layer, backend, context = self.layers[self._next], self.backends[self._next], self._context
        self._next += 1
        assert context is not None
        if layer.scale == 0.0:  # the first step
            layer.scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
            layer.sinks = self._of_heads(sinks, query.shape[1])
            layer.alibi_slopes = self._of_heads(alibi_slopes, query.shape[1])
        head_dim, value_dim = backend.spec.head_dim, value.shape[-1]
        q, k, v = (_rows(x, head_dim) for x in (query, key, value))
        attended = context.attend(backend, layer, q, k, v)
        if value_dim != head_dim:
            attended = attended[..., :value_dim]
        return attended.unsqueeze(0)

    def _of_heads(self, values: Tensor | None, count: int) -> Tensor | None:
        """Those of this rank's heads, float32, of values that are whole on every rank."""
        if values is None:
            return None
        flat = values.detach().flatten().float().contiguous()  # a column of the library's is not
        return flat if len(flat) == count else flat[self._rank * count : (self._rank + 1) * count].contiguous()


def _rows(x: Tensor, head_dim: int) -> Tensor:
    """[num_tokens, heads, head_dim] of [1, heads, num_tokens, dim]."""
    if x.shape[-1] != head_dim:
        x = F.pad(x, (0, head_dim - x.shape[-1]))
    return x[0].transpose(0, 1).contiguous()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Queries and keys come rotated; the cache is written and read by the platform's backend. `alibi_slopes` comes from
    our adapters. Raises Unsupported for attention that is not ours to do."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Of a decoder whose modules do not say so, the mask says it, which is ours.
    reasons = [] if causal or getattr(module, "is_decoder", False) else ["attention that is not causal"]
    if attention_mask is not None and attention_mask.numel() > 1:
        reasons.append("a mask of its own")
    extra = [name for name in _NOT_PASSED_ON if others.get(name) is not None]
    if extra:
        reasons.append(f"{', '.join(extra)} in its scores, which paged attention does not add")
    if reasons:
        raise Unsupported(f"{type(module).__name__} through transformers", reasons)
    bridge: Attends = module.anychip_bridge()  # type: ignore[operator]
    attended = bridge.attend(
        module,
        query,
        key,
        value,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        alibi_slopes=alibi_slopes,
    )
    return attended, None


def give(model: nn.Module, bridge: Attends) -> None:
    """Lets every module of the model find the bridge."""

    def find() -> Attends:
        return bridge

    for module in model.modules():
        module.anychip_bridge = find  # type: ignore[assignment]


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The backend knows what each query sees."""


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
