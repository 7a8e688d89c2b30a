"""NomicBERT: BERT's order of norms, rotary positions and gated feed-forward without biases (config.json:
NomicBertModel, as its authors save it and as transformers does)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from anychip.errors import Unsupported
from anychip.layers.build import Builder
from anychip.layers.encoder import EncoderAttention, FeedForward, activation_of
from anychip.layers.rotary import make_rope
from anychip.model_config import ModelConfig, rope_parameters
from anychip.models.encoder import Encoder, PostNormBlock
from anychip.plugin_api import EncoderSpec

_KNOWN: dict[str, Any] = {
    "causal": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "parallel_block": False, "prenorm": False,
    "qkv_proj_bias": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "use_rms_norm": False, "num_experts": 0,
}  # fmt: skip
"""Fields of the authors' config.json, and their values in models of this form."""


class NomicBert(Encoder):
    prefix = "nomic_bert."
    embedding_norm = "emb_ln"
    positions = None

    def __init__(self, config: ModelConfig, builder: Builder, specs: Sequence[EncoderSpec]) -> None:
        reasons = [
            f"{name} {value!r}; known is {known!r}"
            for name, known in _KNOWN.items()
            if (value := config.get(name, known)) not in (known, None)
        ]
        if reasons:
            raise Unsupported(config.architecture, reasons)
        self.rope = make_rope(config, rope_parameters(config), builder.platform.default_device)
        super().__init__(config, builder, specs)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        name = str(self.config.get("hidden_act", "silu"))
        return activation_of(self.config.architecture, {"swiglu": "silu", "geglu": "gelu"}.get(name, name))

    def block(self, builder: Builder, index: int, spec: EncoderSpec) -> PostNormBlock:
        config, name = self.config, f"{self.prefix}encoder.layers.{index}"
        return PostNormBlock(
            EncoderAttention(
                builder,
                names=[f"{name}.attn.Wqkv"],
                output=f"{name}.attn.out_proj",
                index=index,
                spec=spec,
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                bias=False,
                rope=self.rope,
            ),
            self.layer_norm(builder, f"{name}.norm1"),
            FeedForward(
                builder,
                names=[f"{name}.mlp.fc12", f"{name}.mlp.fc11"],
                down=f"{name}.mlp.fc2",
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                activation=self.activation,
                gated=True,
                bias=False,
            ),
            self.layer_norm(builder, f"{name}.norm2"),
        )
