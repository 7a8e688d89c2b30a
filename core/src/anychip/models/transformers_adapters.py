"""Attention of families whose code does not go through transformers' attention interface, sent through it.

Each adapter makes queries, keys and values with the family's own projections, and leaves the rest to `attention`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from anychip.models.transformers_attention import attention


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[1, heads, num_tokens, head_dim] of [1, num_tokens, heads * head_dim]."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def _attended(module: Any, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """[1, num_tokens, heads * value_dim]."""
    return attention(module, query, key, value, None, **settings)[0].flatten(2)


def _by_heads(module: Any, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, None]:
    """As the method `_attn` of GPT-J and its kin answers: [1, heads, num_tokens, value_dim]."""
    return attention(module, query, key, value, None, **settings)[0].transpose(1, 2), None


def _gptj(self: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> tuple[Tensor, None]:
    return _by_heads(self, query, key, value, scaling=1 / self.scale_attn)


def _gpt_neo(self: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> tuple[Tensor, None]:
    window = self.config.window_size if self.attention_type == "local" else None
    return _by_heads(self, query, key, value, scaling=1.0, sliding_window=window)


def _gpt_neox_japanese(self: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> tuple[Tensor, None]:
    return _by_heads(self, query, key, value, scaling=1 / self.norm_factor)


def _openai_gpt(self: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> list[Any]:
    """Its keys come transposed, for the product."""
    scaling = value.shape[-1] ** -0.5 if self.scale else 1.0
    return list(_by_heads(self, query, key.transpose(2, 3), value, scaling=scaling))


def _bloom(self: Any, hidden_states: Tensor, residual: Tensor, *others: Any, **named: Any) -> tuple[Tensor, None]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    slopes = _alibi_slopes(self)
    mixed = _attended(self, query, key, value, scaling=self.inv_norm_factor, alibi_slopes=slopes)
    return residual + self.dense(mixed), None


def _falcon(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    *others: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    settings: dict[str, Any] = {"scaling": self.head_dim**-0.5}
    if alibi is None:
        assert position_embeddings is not None
        query, key = _code_of(self).apply_rotary_pos_emb(query, key, *position_embeddings)
    else:
        settings["alibi_slopes"] = _alibi_slopes(self) * self.inv_norm_factor
    return self.dense(_attended(self, query, key, value, **settings)), None


def _mpt(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, None]:
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (_heads(x, self.head_dim) for x in mixed.chunk(3, dim=2))
    slopes = _alibi_slopes(self)
    return self.out_proj(_attended(self, query, key, value, scaling=self.softmax_scale, alibi_slopes=slopes)), None


def _bart_like(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, None]:
    query, key, value = (_heads(project(hidden_states), self.head_dim) for project in _projections(self))
    return self.out_proj(_attended(self, query, key, value, scaling=self.scaling)), None


def _projections(module: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    return module.q_proj, module.k_proj, module.v_proj


def _bert_like(self: Any, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, None]:
    dim = self.attention_head_size
    query, key, value = (_heads(project(hidden_states), dim) for project in (self.query, self.key, self.value))
    return _attended(self, query, key, value, scaling=dim**-0.5, is_causal=self.is_decoder), None


def _roformer(
    self: Any, hidden_states: Tensor, mask: Any = None, sinusoidal_pos: Any = None, *others: Any, **named: Any
) -> tuple[Tensor, None]:
    dim = self.attention_head_size
    query, key, value = (_heads(project(hidden_states), dim) for project in (self.query, self.key, self.value))
    if self.rotary_value:
        query, key, value = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key, value)
    else:
        query, key = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key)
    return _attended(self, query, key, value, scaling=dim**-0.5, is_causal=self.is_decoder), None


def _code_of(module: nn.Module) -> Any:
    """The module of Python in which a class of the library is written."""
    return sys.modules[type(module).__module__]


def _alibi_slopes(module: Any) -> Tensor:
    """[num_heads], by the library's own function; `adapt` leaves them with the module."""
    slopes: Tensor = module.anychip_slopes
    return slopes


def _bloom_slopes(code: Any, num_heads: int) -> Tensor:
    bias: Tensor = code.build_alibi_tensor(torch.ones((1, 2)), num_heads, torch.float32)
    return bias[:, 0, 1]


def _mpt_slopes(code: Any, num_heads: int) -> Tensor:
    """Its bias is 0 at the last key and counts backwards."""
    bias: Tensor = code.build_mpt_alibi_tensor(num_heads, 2)
    return -bias[:, 0, 0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Replaces `method` of attention modules of class `module` by `function`. `slopes` makes their ALiBi slopes of the
    family's modelling code and a number of heads. `mask`: the decoder is given a finished mask, as others are, or none.
    """

    module: str
    function: Callable[..., Any]
    method: str = "forward"
    slopes: Callable[[Any, int], Tensor] | None = None
    mask: bool = True


ADAPTERS = {
    "BloomForCausalLM": Adapter("BloomAttention", _bloom, slopes=_bloom_slopes, mask=False),
    "CodeGenForCausalLM": Adapter("CodeGenAttention", _gptj, "_attn"),
    "FalconForCausalLM": Adapter("FalconAttention", _falcon, slopes=_bloom_slopes, mask=False),
    "GPTJForCausalLM": Adapter("GPTJAttention", _gptj, "_attn"),
    "GPTNeoForCausalLM": Adapter("GPTNeoSelfAttention", _gpt_neo, "_attn"),
    "GPTNeoXJapaneseForCausalLM": Adapter("GPTNeoXJapaneseAttention", _gpt_neox_japanese, "_attn"),
    "MegatronBertForCausalLM": Adapter("MegatronBertSelfAttention", _bert_like),
    "MptForCausalLM": Adapter("MptAttention", _mpt, slopes=_mpt_slopes),
    "MvpForCausalLM": Adapter("MvpAttention", _bart_like),
    "OpenAIGPTLMHeadModel": Adapter("Attention", _openai_gpt, "_attn"),
    "RemBertForCausalLM": Adapter("RemBertSelfAttention", _bert_like),
    "RoFormerForCausalLM": Adapter("RoFormerSelfAttention", _roformer),
    "TrOCRForCausalLM": Adapter("TrOCRAttention", _bart_like),
    "XGLMForCausalLM": Adapter("XGLMAttention", _bart_like),
}
"""By architecture."""


def adapt(model: nn.Module, adapter: Adapter, device: str) -> None:
    for module in model.modules():
        if type(module).__name__ != adapter.module:
            continue
        setattr(module, adapter.method, MethodType(adapter.function, module))
        if adapter.slopes is not None:
            heads: int = getattr(module, "num_heads", None) or module.n_heads  # type: ignore[assignment]
            with torch.device("cpu"):  # the model around it may be made on the meta device
                slopes = adapter.slopes(_code_of(module), heads)
            module.anychip_slopes = slopes.to(device)
