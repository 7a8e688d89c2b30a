"""Any decoder that transformers implements: its own modelling code, with our attention, KV cache and products.

The library's model is built on the meta device. Its attention goes through the function that is registered here,
its linear layers and experts are replaced by ours, split over ranks as its tensor-parallel plan says, and every other
parameter is streamed from the checkpoint by its own name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from anychip.layers.build import Builder
from anychip.layers.kv_scales import want_kv_scales
from anychip.model_config import ModelConfig
from anychip.models import transformers_layers as layers
from anychip.models.transformers_attention import AttentionBridge, give
from anychip.models.transformers_buffers import fill_buffers
from anychip.models.transformers_experts import fused_experts, run_plain
from anychip.models.transformers_extras import arguments, show
from anychip.models.transformers_library import LibraryClass, Recorded
from anychip.models.transformers_rope import hold_still
from anychip.models.transformers_weights import Conversions
from anychip.plugin_api import AttentionBackend, AttentionLayer, AttentionSpec, ForwardContext, WeightView

_IGNORED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")


class TransformersModel:
    """plugin_api.StepModel."""

    def __init__(
        self,
        library: LibraryClass,
        recorded: Recorded,
        config: ModelConfig,
        builder: Builder,
        specs: Sequence[AttentionSpec],
    ) -> None:
        self.num_layers = config.num_layers
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self._library = library
        self._builder = builder
        device = builder.platform.default_device
        builder.weights.ignored += _IGNORED
        self.hf = library.build(builder.dtype, device)
        conversions = Conversions(self.hf, builder.stored.names)
        builder.weights.rename = conversions.rename
        base_name = library.base_name(self.hf)
        builder.weights.decoder = f"{base_name}."
        self._modules = dict(self.hf.named_modules())
        self._sources: dict[type, str] = {}
        self.bridge = AttentionBridge(
            self._attention_layers(specs, recorded),
            [builder.attention(spec) for spec in specs],
            builder.mesh.axis("tp").rank,
        )
        self._replace_experts(recorded, conversions)
        self.expert_layers = builder.expert_layers
        self._replace_embeddings()
        self._replace_linears()
        self._want_parameters()
        for name, held in fill_buffers(self.hf, device).items():
            self._want(name, held)
            builder.weights.optional.add(name)
        hold_still(self.hf, config.max_positions)
        conversions.redirect(builder.weights)
        give(self.hf, self.bridge)
        self.decoder = library.decoder(self.hf, device)
        self._ran = False
        setattr(self.hf, base_name, layers.GivenHidden())

    @property
    def attention(self) -> list[AttentionBackend]:
        return self.bridge.backends

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        if self._ran:
            return self._forward(input_ids, positions, context)
        with self._library.blamed("in its first step"):
            hidden = self._forward(input_ids, positions, context)
            self._ran = True
            return hidden

    def _forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        self.bridge.begin(context)
        extras = context.extras
        result = self.decoder(positions, **arguments(self.decoder.module, input_ids, extras))
        hidden: Tensor = result.last_hidden_state[0]
        if extras is not None and extras.tap_layers:
            show(self.decoder.module, extras, result.hidden_states, hidden, last=self.num_layers - 1)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        # The model's own head, with whatever it scales or caps: its decoder is replaced by these hidden states.
        logits: Tensor = self.hf(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        return logits

    # -- building -----------------------------------------------------------------------------------------

    def _attention_layers(self, specs: Sequence[AttentionSpec], recorded: Recorded) -> list[AttentionLayer]:
        made = []
        for index, (call, spec) in enumerate(zip(recorded.attention, specs, strict=True)):
            layer = AttentionLayer(index=index, scale=0.0, ops=self._builder.ops)
            if self._builder.kv_scales:
                want_kv_scales(self._builder, call.module, spec, call.num_kv_heads, layer)
            made.append(layer)
        return made

    def _replace(self, name: str, module: nn.Module) -> None:
        self.hf.set_submodule(name, module)
        self._modules[name] = module

    def _replace_experts(self, recorded: Recorded, conversions: Conversions) -> None:
        for name, top_k in recorded.top_k.items():
            fused = fused_experts(self._builder, name, self._modules[name], top_k, conversions)
            if fused is not None:
                self._replace(name, fused)
        run_plain(self.hf)

    def _replace_embeddings(self) -> None:
        embedding, head = self.hf.get_input_embeddings(), self.hf.get_output_embeddings()  # type: ignore[no-untyped-call]
        name, head_name = self._name_of(embedding), self._name_of(head)
        tied = bool(getattr(self._library.config, "tie_word_embeddings", False))
        if type(embedding) is not nn.Embedding:  # it does more than look up: its weight is kept whole
            if tied and head_name and self._builder.stored.tie(head_name, name):
                self._replace(head_name, layers.TiedHead(embedding, head.bias))
            return
        ours = layers.embedding(self._builder, name, embedding)
        self._replace(name, ours)
        if head_name and type(head) is nn.Linear:
            self._replace(head_name, layers.head(self._builder, head_name, head, ours if tied else None))

    def _name_of(self, module: nn.Module) -> str:
        return next((str(name) for name, candidate in self._modules.items() if candidate is module), "")

    def _replace_linears(self) -> None:
        for name, module in list(self._modules.items()):
            if type(module) is nn.Linear:
                style = self._style(name) if self._builder.mesh.shape.tp > 1 else "replicated"
                if style == "replicated" and self._reads_weight(name):
                    continue
                self._replace(name, layers.parallel_linear(self._builder, name, module, style))

    def _reads_weight(self, name: str) -> bool:
        """Whether code around a linear layer multiplies by its weight itself: then it stays the library's."""
        parent, _, leaf = name.rpartition(".")
        around = [type(self._modules[".".join(parent.split(".")[:end])]) for end in range(1, parent.count(".") + 2)]
        return any(f".{leaf}.weight" in self._source(cls) for cls in around)

    def _source(self, cls: type) -> str:
        """Of a class of the library; nothing of torch's, or where it cannot be had."""
        if cls not in self._sources:
            try:
                self._sources[cls] = "" if cls.__module__.startswith("torch.") else inspect.getsource(cls)
            except (OSError, TypeError):
                self._sources[cls] = ""
        return self._sources[cls]

    def _style(self, name: str) -> str:
        for pattern, style in self._library.plan.items():
            if fnmatchcase(name, pattern):
                return style
        return "replicated"

    def _want_parameters(self) -> None:
        """What is left on the meta device: norms, position embeddings, anything that is not a product."""
        stored = {self._builder.weights.place(name) for name in self._builder.stored.names}
        names: dict[int, list[str]] = {}
        for name, parameter in self.hf.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for same in names.values():
            # A parameter in several places has one name in the checkpoint, or several with the same values.
            chosen = next((name for name in same if name in stored), same[0])
            self._builder.weights.ignored += tuple(name for name in same if name != chosen)
            self._hold(chosen, same)

    def _hold(self, chosen: str, names: Sequence[str]) -> None:
        meta = self.hf.get_parameter(chosen)
        dtype = str(meta.dtype).removeprefix("torch.")
        held = self._builder.platform.empty(tuple(meta.shape), dtype, "weights")
        parameter = nn.Parameter(held, requires_grad=False)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(self.hf.get_submodule(parent), leaf, parameter)
        self._want(chosen, held)

    def _want(self, name: str, held: Tensor) -> None:
        shape = tuple(held.shape)

        def take(view: WeightView) -> None:
            held.copy_(view.read(*((0, extent) for extent in shape)))

        self._builder.weights.want(name, shape, take)
