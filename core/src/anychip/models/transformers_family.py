"""Which of transformers' classes core can run, and what KV caches one needs: its own code is asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import transformers
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from anychip.errors import AnychipError, ConfigError, Unsupported
from anychip.layers.build import Builder
from anychip.model_config import ModelConfig, load_model_config
from anychip.models import transformers_layers as layers
from anychip.models.transformers_adapters import ADAPTERS
from anychip.models.transformers_attention import AttentionCall
from anychip.models.transformers_library import LibraryClass, Recorded
from anychip.models.transformers_model import TransformersModel
from anychip.plugin_api import KV_HEADS, REPLICATED, AttentionSpec, MeshShape, Sharded
from anychip.types import DType

_KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers that keep nothing else."""


class TransformersFamily:
    """models.registry.ModelFamily over one of transformers' classes."""

    def __init__(self, library: LibraryClass) -> None:
        self.library = library

    @cached_property
    def recorded(self) -> Recorded:
        config = self.library.config
        with unset_fake_temporarily():
            recorded = self.library.record()
        if not recorded.attention:
            raise Unsupported(self.library.who, ["its attention does not go through transformers' attention interface"])
        layers_told = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None) or 0
        if len(recorded.attention) < layers_told:
            asks = f"{len(recorded.attention)} of its {layers_told} layers ask for attention"
            raise Unsupported(self.library.who, [f"{asks}, and nothing says what the others do"])
        return recorded

    def attention_specs(
        self, config: ModelConfig, shape: MeshShape, dtype: DType, kv_dtype: DType
    ) -> list[AttentionSpec]:
        """By call of a forward pass: what the code asks for, on one rank of a mesh."""
        share = self._heads_share(shape.tp)
        self._check_chunks(config.max_positions)
        specs = []
        for call in self.recorded.attention:
            if call.num_kv_heads % share or call.num_heads % share:
                raise ConfigError(
                    f"{call.num_heads} heads and {call.num_kv_heads} key-value heads do not split over {share} ranks "
                    "in this model's plan"
                )
            specs.append(
                AttentionSpec(
                    num_heads=call.num_heads // share,
                    num_kv_heads=call.num_kv_heads // share,
                    head_dim=call.head_dim,
                    dtype=dtype,
                    kv_dtype=kv_dtype,
                    window=self._window(call),
                    softcap=call.softcap,
                    sinks=call.sinks,
                    alibi=call.alibi,
                    pages=(Sharded(dim=KV_HEADS),) if share > 1 else REPLICATED,
                )
            )
        return specs

    def _check_chunks(self, served: int) -> None:
        """A chunk as long as the context is full attention. Raises Unsupported for a shorter one."""
        kinds = getattr(self.library.config, "layer_types", None) or ()
        size = getattr(self.library.config, "attention_chunk_size", None)
        if "chunked_attention" in kinds and size is not None and served > size:
            raise Unsupported(
                self.library.who,
                [f"attention in chunks of {size} tokens, and {served} are served; --max-model-len {size}"],
            )

    def _window(self, call: AttentionCall) -> int | None:
        """What the code passes on; where it only masks, what config.json says of the layer, or of all."""
        size = getattr(self.library.config, "sliding_window", None)
        kinds = getattr(self.library.config, "layer_types", None)
        if kinds is not None and call.layer is not None and call.layer < len(kinds):
            masked = kinds[call.layer] == "sliding_attention"
        else:
            masked = self._masks_windows and all(other.window is None for other in self.recorded.attention)
        return size if call.window is None and masked else call.window

    @cached_property
    def _masks_windows(self) -> bool:
        return hasattr(sys.modules[self.library.cls.__module__], "create_sliding_window_causal_mask")

    def _heads_share(self, size: int) -> int:
        """How many ranks the attention heads are split over: a plan may gather them again for a norm over all."""
        if size == 1:
            return 1
        plan = self.library.plan
        if not plan:
            raise Unsupported(
                f"{self.library.cls.__name__} over {size} ranks", ["transformers has no tensor-parallel plan for it"]
            )
        inputs = [style for name, style in plan.items() if name.endswith(layers.QUERY_NAMES)]
        return size if inputs and all(style == "colwise" for style in inputs) else 1

    def __call__(self, config: ModelConfig, builder: Builder, specs: Sequence[AttentionSpec]) -> TransformersModel:
        with self.library.blamed("as its layers were replaced"):
            return TransformersModel(self.library, self.recorded, config, builder, specs)


def transformers_family(model: ModelConfig, *, trust_remote_code: bool) -> TransformersFamily:
    """Raises ConfigError or Unsupported with what keeps the architecture from running."""
    cls = getattr(transformers, model.architecture, None) or _remote_class(model, trust_remote_code)
    code = not hasattr(transformers, model.architecture)
    own = getattr(cls, "config_class", None)
    try:
        if own is not None and own.model_type == model.get("model_type"):
            config = own.from_pretrained(model.folder)
        else:
            config = transformers.AutoConfig.from_pretrained(model.folder, trust_remote_code=code)
    except AnychipError:
        raise
    except Exception as error:
        raise ConfigError(f"transformers does not read {model.folder}/config.json: {error}") from error
    if model.num_layers != load_model_config(model.folder).num_layers:
        _cut(config, model.num_layers)
    _check(config, cls)
    return TransformersFamily(LibraryClass(config, cls, _tensor_parallel_plan(config, cls)))


def _cut(config: Any, num_layers: int) -> None:
    """To the first layers, of which a plan builds no more."""
    whole = config.num_hidden_layers
    config.num_hidden_layers = num_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, value[:num_layers])


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
    """What can be told without the code running."""
    reasons = []
    if not issubclass(cls, PreTrainedModel):
        raise Unsupported(f"{cls.__name__} through transformers", ["it is no model of the library"])
    modules = {base.__module__ for base in cls.__mro__} - {PreTrainedModel.__module__}
    interface = any(hasattr(sys.modules.get(module), "ALL_ATTENTION_FUNCTIONS") for module in modules)
    if getattr(cls, "_is_stateful", False):
        reasons.append("it keeps a state for each sequence beside keys and values")
    elif not interface and cls.__name__ not in ADAPTERS:
        reasons.append("its attention does not go through transformers' attention interface")
    if not _is_language_model(cls):
        reasons.append("it is no decoder-only language model")
    kinds = sorted({*(getattr(config, "layer_types", None) or ())} - _KEYS_AND_VALUES)
    if kinds:
        reasons.append(f"layers of type {', '.join(kinds)}, which keep more than keys and values")
    if reasons:
        raise Unsupported(f"{cls.__name__} through transformers", reasons)


def _is_language_model(cls: type[Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as registered

    return cls.__name__.endswith("ForCausalLM") or cls.__name__ in registered.values()


def _tensor_parallel_plan(config: Any, cls: type[Any]) -> dict[str, str]:
    prefix = cls.base_model_prefix
    base = getattr(config, "base_model_tp_plan", None) or {}
    return {f"{prefix}.{pattern}": style for pattern, style in base.items()}
