"""What a model's layers reach in one step: plans, caches, and what the step has beyond token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anychip.plugin_api.adapters import StepAdapters
from anychip.plugin_api.attention import AttentionBackend, AttentionLayer
from anychip.plugin_api.cache import Cache
from anychip.plugin_api.encoder import EncoderBackend, EncoderLayer
from anychip.plugin_api.forward_extras import ForwardExtras, Turning
from anychip.plugin_api.graph import RunOutsideGraph
from anychip.plugin_api.latent import IndexInputs, LatentBackend, LatentLayer
from anychip.plugin_api.state import StateBackend, StateLayer

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.ops import QKNorm, Rope


@dataclass(slots=True)
class ForwardContext:
    """What a model's attention layers need in one step. Layers replace their cache, so functional backends
    fit: caches[layer] holds the newest."""

    plans: Sequence[Any]  # by KV group
    caches: list[Any]  # by layer
    layer_groups: Sequence[int]  # by layer
    run_outside_graph: RunOutsideGraph | None = None
    """Given while a step is captured in pieces: attention then runs between the pieces."""
    extras: ForwardExtras | None = None
    adapters: StepAdapters | None = None
    """None: no token of the step has one."""
    chosen: Tensor | None = None
    """int32 [num_tokens, top_k]: what the last layer that chose tokens has chosen; layers behind it may attend to the
    same."""
    routed: Tensor | None = None
    """[num_tokens] bool: False for padded tokens, which no expert is to see. None: nobody asks."""

    def attend(
        self,
        backend: AttentionBackend,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        *,
        rope: Rope | None = None,
        qk_norm: QKNorm | None = None,
    ) -> Tensor:
        """AttentionBackend.forward on a layer's plan and cache."""
        index, group, caches = layer.index, self.layer_groups[layer.index], self.caches
        if self.extras is not None and (turning := self._turning(rope)) is not None:
            q, k = layer.ops.qkv_norm_rope(q=q, k=k, positions=turning.positions, rope=turning.rope, qk_norm=qk_norm)
            rope = qk_norm = None
        if self.run_outside_graph is None:
            plan = self.plans[group]
            attended, caches[index] = backend.forward(q, k, v, caches[index], plan, layer, rope=rope, qk_norm=qk_norm)
            return attended
        return self._run(
            index,
            lambda cache, plan, out: backend.forward(q, k, v, cache, plan, layer, rope=rope, qk_norm=qk_norm, out=out),
        )

    def attend_latent(
        self,
        backend: LatentBackend,
        layer: LatentLayer,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        *,
        rope: Rope | None = None,
    ) -> Tensor:
        """LatentBackend.forward on a layer's plan and cache. A layer with index keys attends to what is chosen."""
        sparse = {"chosen": self.chosen} if backend.spec.index_dim else {}
        if (turning := self._turning(rope)) is not None:
            q_rope, k_rope = layer.turned(q_rope, k_rope, turning.positions, turning.rope)
            rope = None
        return self._run(
            layer.index,
            lambda cache, plan, out: backend.forward(
                q_nope, q_rope, latent, k_rope, cache, plan, layer, rope=rope, out=out, **sparse
            ),
        )

    def choose(self, backend: LatentBackend, layer: LatentLayer, index: IndexInputs, *, rope: Rope) -> None:
        """LatentBackend.choose on a layer's plan and cache: what this layer, and those behind it that choose nothing,
        attend to."""
        self.chosen = self._run(
            layer.index, lambda cache, plan, _: backend.choose(index, cache, plan, layer, rope=rope)
        )

    def advance(self, backend: StateBackend, layer: StateLayer, inputs: Mapping[str, Tensor]) -> Tensor:
        """StateBackend.forward on a layer's plan and cache."""
        return self._run(layer.index, lambda cache, plan, _: backend.forward(inputs, cache, plan, layer))

    def encode(
        self,
        backend: EncoderBackend,
        layer: EncoderLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rope: Rope | None = None,
    ) -> Tensor:
        """EncoderBackend.forward on a layer's plan."""
        return self._run(layer.index, lambda cache, plan, _: (backend.forward(q, k, v, plan, layer, rope=rope), cache))

    def _turning(self, rope: Rope | None) -> Turning | None:
        """How the step's tokens turn where that is not by their places; None: as BatchView.positions says."""
        return None if self.extras is None or rope is None else self.extras.turning(rope)

    def _run(self, index: int, forward: Callable[[Cache, Any, Tensor | None], tuple[Tensor, Cache]]) -> Tensor:
        """Calls a layer's forward(cache, plan, out); where a step is captured in pieces, between the pieces."""
        group, caches = self.layer_groups[index], self.caches

        def call(plans: Sequence[Any], out: Tensor | None) -> Tensor:
            result, caches[index] = forward(caches[index], plans[group], out)
            return result

        return call(self.plans, None) if self.run_outside_graph is None else self.run_outside_graph(call)
