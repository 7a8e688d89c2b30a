"""Any decoder that transformers implements: its own modelling code, with our attention, KV cache and products.

The library's model is built on the meta device. Its attention goes through the function that is registered here,
its linear layers are replaced by ours, split over ranks as its tensor-parallel plan says, and every other parameter
is streamed from the checkpoint by its own name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from anychip.errors import ConfigError, Unsupported
from anychip.layers.build import Builder
from anychip.layers.kv_scales import want_kv_scales
from anychip.model_config import ModelConfig
from anychip.models import transformers_layers as layers
from anychip.models.transformers_attention import ATTENTION, AttentionBridge
from anychip.models.transformers_buffers import fill_buffers
from anychip.models.transformers_extras import arguments, show
from anychip.plugin_api import (
    KV_HEADS,
    REPLICATED,
    AttentionBackend,
    AttentionLayer,
    AttentionSpec,
    ForwardContext,
    MeshShape,
    Sharded,
    WeightView,
)
from anychip.types import DType

_MOVING_ROPES = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies change with a batch's longest request: a cached key cannot follow."""

_IGNORED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")


class TransformersFamily:
    """models.registry.ModelFamily over one of transformers' classes."""

    def __init__(self, config: Any, cls: type[Any]) -> None:
        self.hf_config = config
        self.cls = cls
        self.plan = _tensor_parallel_plan(config, cls)

    def attention_specs(
        self, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> list[AttentionSpec]:
        """What config.json says; the attention function checks it against what the model's code passes."""
        share = self._heads_share(shape.tp)
        if config.num_kv_heads % share:
            raise ConfigError(
                f"{config.num_kv_heads} key-value heads do not split over {share} ranks in this model's plan"
            )
        full = AttentionSpec(
            num_heads=config.num_heads // share,
            num_kv_heads=config.num_kv_heads // share,
            head_dim=config.head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
            softcap=getattr(self.hf_config, "attn_logit_softcapping", None),
            pages=(Sharded(dim=KV_HEADS),) if share > 1 else REPLICATED,
        )
        specs = []
        for kind in self._layer_types(config.num_layers):
            window = getattr(self.hf_config, "sliding_window", None) if kind == "sliding_attention" else None
            specs.append(replace(full, window=window))
        return specs

    def _heads_share(self, size: int) -> int:
        """How many ranks the attention heads are split over: a plan may gather them again for a norm over all."""
        if size == 1:
            return 1
        if not self.plan:
            raise Unsupported(
                f"{self.cls.__name__} over {size} ranks", ["transformers has no tensor-parallel plan for it"]
            )
        inputs = [style for name, style in self.plan.items() if name.endswith(layers.QUERY_NAMES)]
        return size if inputs and all(style == "colwise" for style in inputs) else 1

    def _layer_types(self, num_layers: int) -> list[str]:
        kinds = getattr(self.hf_config, "layer_types", None)
        if kinds is None:
            windowed = getattr(self.hf_config, "sliding_window", None) is not None
            kinds = ["sliding_attention" if windowed else "full_attention"] * num_layers
        unknown = sorted({*kinds} - {"full_attention", "sliding_attention"})
        if unknown:
            raise Unsupported(f"{self.cls.__name__} through transformers", [f"layers of type {', '.join(unknown)}"])
        return list(kinds)

    def __call__(self, config: ModelConfig, builder: Builder, specs: Sequence[AttentionSpec]) -> TransformersModel:
        return TransformersModel(self, config, builder, specs)


class TransformersModel:
    """plugin_api.StepModel."""

    def __init__(
        self, family: TransformersFamily, config: ModelConfig, builder: Builder, specs: Sequence[AttentionSpec]
    ) -> None:
        self.num_layers = config.num_layers
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self._family = family
        self._builder = builder
        builder.weights.ignored += _IGNORED
        builder.weights.rename = self._module_name
        with torch.device("meta"):
            self.hf = family.cls._from_config(
                family.hf_config, attn_implementation=ATTENTION, dtype=getattr(torch, builder.dtype)
            ).eval()
        builder.weights.decoder = f"{self.hf.base_model_prefix}."
        self._renamings = [r for r in get_model_conversion_mapping(self.hf) if isinstance(r, WeightRenaming)]
        self._modules = dict(self.hf.named_modules())
        self.bridge = AttentionBridge(self._attention_layers(specs, config), self._backends(specs))
        self._replace_embeddings(config)
        self._replace_linears()
        self._want_parameters()
        fill_buffers(self.hf, builder.platform.default_device)
        # A mask of four dimensions is taken as finished: the library neither builds one nor looks at positions.
        self._no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=builder.platform.default_device)
        self.base = getattr(self.hf, self.hf.base_model_prefix)
        setattr(self.hf, self.hf.base_model_prefix, layers.GivenHidden())

    @property
    def attention(self) -> list[AttentionBackend]:
        return self.bridge.backends

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        self.bridge.context = context
        extras = context.extras
        result = self.base(
            **arguments(self.base, input_ids, extras),
            position_ids=positions.unsqueeze(0).long(),
            attention_mask=self._no_mask,
            use_cache=False,
        )
        hidden: Tensor = result.last_hidden_state[0]
        if extras is not None and extras.tap_layers:
            show(self.base, extras, result.hidden_states, hidden, last=self.num_layers - 1)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        # The model's own head, with whatever it scales or caps: its decoder is replaced by these hidden states.
        logits: Tensor = self.hf(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        return logits

    def _module_name(self, name: str) -> str:
        """The library's modules have changed names since some checkpoints were written."""
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return str(name)

    # -- building -----------------------------------------------------------------------------------------

    def _backends(self, specs: Sequence[AttentionSpec]) -> list[AttentionBackend]:
        return [self._builder.platform.attention(spec) for spec in specs]

    def _attention_layers(self, specs: Sequence[AttentionSpec], config: ModelConfig) -> list[AttentionLayer]:
        made: dict[int, AttentionLayer] = {}
        for name, module in self._modules.items():
            index = getattr(module, "layer_idx", None)
            if not isinstance(index, int) or not hasattr(module, "is_causal"):
                continue
            module.anychip_bridge = lambda: self.bridge
            made[index] = AttentionLayer(index=index, scale=0.0, ops=self._builder.ops)
            if self._builder.kv_scales:
                want_kv_scales(self._builder, name, specs[index], config.num_kv_heads, made[index])
        if sorted(made) != list(range(len(specs))):
            raise Unsupported(
                f"{type(self.hf).__name__} through transformers",
                [f"{len(made)} attention layers were found and config.json has {len(specs)} layers"],
            )
        return [made[index] for index in range(len(specs))]

    def _replace(self, name: str, module: nn.Module) -> None:
        self.hf.set_submodule(name, module)
        self._modules[name] = module

    def _replace_embeddings(self, config: ModelConfig) -> None:
        embedding, head = self.hf.get_input_embeddings(), self.hf.get_output_embeddings()
        name, head_name = self._name_of(embedding), self._name_of(head)
        tied = bool(getattr(self._family.hf_config, "tie_word_embeddings", False))
        if type(embedding) is not nn.Embedding:  # it does more than look up: its weight is kept whole
            if tied and self._builder.stored.tie(head_name, name):
                self._replace(head_name, layers.TiedHead(embedding, head.bias))
            return
        ours = layers.embedding(self._builder, name, config)
        self._replace(name, ours)
        self._replace(head_name, layers.head(self._builder, head_name, config, ours if tied else None, head.bias))

    def _name_of(self, module: nn.Module) -> str:
        return next((str(name) for name, candidate in self._modules.items() if candidate is module), "")

    def _replace_linears(self) -> None:
        for name, module in list(self._modules.items()):
            if type(module) is nn.Linear:
                style = self._style(name) if self._builder.mesh.shape.tp > 1 else "replicated"
                self._replace(name, layers.parallel_linear(self._builder, name, module, style))

    def _style(self, name: str) -> str:
        for pattern, style in self._family.plan.items():
            if fnmatchcase(name, pattern):
                return style
        return "replicated"

    def _want_parameters(self) -> None:
        """What is left on the meta device: norms, position embeddings, anything that is not a product."""
        for name, parameter in self.hf.named_parameters():
            if parameter.dim() > 2:
                raise Unsupported(
                    f"{type(self.hf).__name__} through transformers",
                    [f"{name} is stacked, {list(parameter.shape)}: experts need a native family"],
                )
            self._hold(name, parameter)

    def _hold(self, name: str, parameter: nn.Parameter) -> None:
        shape = tuple(parameter.shape)
        held = self._builder.platform.empty(shape, self._builder.dtype, "weights")
        parent, _, leaf = name.rpartition(".")
        setattr(self.hf.get_submodule(parent), leaf, nn.Parameter(held, requires_grad=False))

        def take(view: WeightView) -> None:
            held.copy_(view.read(*((0, extent) for extent in shape)))

        self._builder.weights.want(name, shape, take)


def transformers_family(model: ModelConfig, *, trust_remote_code: bool) -> TransformersFamily:
    """Raises ConfigError or Unsupported with what keeps the architecture from running."""
    cls = getattr(transformers, model.architecture, None) or _remote_class(model, trust_remote_code)
    code = not hasattr(transformers, model.architecture)
    config = transformers.AutoConfig.from_pretrained(model.folder, trust_remote_code=code)
    if config.num_hidden_layers != model.num_layers:  # a plan builds the first layers only
        config.num_hidden_layers = model.num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: model.num_layers]
    _check(config, cls)
    return TransformersFamily(config, cls)


def _remote_class(model: ModelConfig, trust_remote_code: bool) -> type[Any]:
    """A class whose code lies in the checkpoint."""
    remote = (model.get("auto_map") or {}).get("AutoModelForCausalLM")
    if remote is None:
        raise ConfigError(
            f"architecture {model.architecture!r} has no native family and transformers {transformers.__version__} "
            "does not implement it"
        )
    if not trust_remote_code:
        raise ConfigError(
            f"architecture {model.architecture!r} is code in the checkpoint ({remote}), which is not run unless "
            "--trust-remote-code allows it"
        )
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    cls: type[Any] = get_class_from_dynamic_module(remote, model.folder)
    return cls


def _check(config: Any, cls: type[Any]) -> None:
    reasons = []
    modules = {base.__module__ for base in cls.__mro__} - {PreTrainedModel.__module__}
    if not any(hasattr(sys.modules.get(module), "ALL_ATTENTION_FUNCTIONS") for module in modules):
        reasons.append("its attention does not go through transformers' attention interface")
    if getattr(config, "is_encoder_decoder", False) or not cls.__name__.endswith("ForCausalLM"):
        reasons.append("it is no decoder-only language model")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _MOVING_ROPES:
        reasons.append(f"its rotary embedding is {rope['rope_type']}, which changes with the longest request")
    if reasons:
        raise Unsupported(f"{cls.__name__} through transformers", reasons)


def _tensor_parallel_plan(config: Any, cls: type[Any]) -> dict[str, str]:
    """Patterns of module names to styles, in the whole model's names."""
    prefix = cls.base_model_prefix
    base = getattr(config, "base_model_tp_plan", None) or {}
    return {f"{prefix}.{pattern}": style for pattern, style in base.items()}
