"""The step seam: a program that runs whole steps over donated state.

Core itself implements the torch seam as a StepProgram (worker/torch_program), so both seams share one runner.
A step is forward(state, StepInputs), then sample(state, hidden, SamplingInputs); the state goes in and a new one
comes out, and the old one must not be used again.

The state holds the KV cache, each slot's last sampled id, and what penalties and biases edit logits by: counts
[max_slots + 1, vocab_size], bias ids and biases [max_slots + 1, MAX_BIASES]. `edit_state_bytes` says how much that is.
What goes into a step is declared in plugin_api/step_inputs, what comes out of it in plugin_api/step_outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from anychip.errors import Unsupported
from anychip.plugin_api.attention import AttentionBackend, AttentionLayer
from anychip.plugin_api.cache import Cache, CacheBackend
from anychip.plugin_api.cache_specs import CacheSpec
from anychip.plugin_api.forward_extras import ForwardExtras, Turning
from anychip.plugin_api.graph import RunOutsideGraph, ShapeKey
from anychip.plugin_api.latent import LatentBackend, LatentLayer
from anychip.plugin_api.mesh import Mesh, MeshShape
from anychip.plugin_api.sharding import HeldTensor
from anychip.plugin_api.state import StateBackend, StateLayer
from anychip.plugin_api.step_inputs import EmbeddingRows, EnteringRow, SamplingInputs, StepInputs
from anychip.plugin_api.step_outputs import StepOutputs

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.linear import WeightView
    from anychip.plugin_api.ops import Ops, QKNorm, Rope

State = Any
Hidden = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    num_programs: int
    seconds: float


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
        """LatentBackend.forward on a layer's plan and cache."""
        if (turning := self._turning(rope)) is not None:
            q_rope, k_rope = layer.turned(q_rope, k_rope, turning.positions, turning.rope)
            rope = None
        return self._run(
            layer.index,
            lambda cache, plan, out: backend.forward(
                q_nope, q_rope, latent, k_rope, cache, plan, layer, rope=rope, out=out
            ),
        )

    def advance(self, backend: StateBackend, layer: StateLayer, inputs: Mapping[str, Tensor]) -> Tensor:
        """StateBackend.forward on a layer's plan and cache."""
        return self._run(layer.index, lambda cache, plan, _: backend.forward(inputs, cache, plan, layer))

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


class StepModel(Protocol):
    """A model with its weights, on one rank."""

    num_layers: int
    vocab_size: int
    hidden_size: int

    @property
    def attention(self) -> Sequence[CacheBackend]:
        """What keeps each layer's cache, by layer: AttentionBackend, LatentBackend, StateBackend."""
        ...

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states [num_tokens, hidden_size]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, vocab_size], whole on every rank."""
        ...


class ModelSource(Protocol):
    """A checkpoint that can be built for any rank of any mesh: what step_program is given."""

    architecture: str
    vocab_size: int
    ops: Ops

    def attention_specs(self, shape: MeshShape) -> Sequence[CacheSpec]:
        """By layer, for one rank of a mesh; needs no weights. A layer that keeps two caches counts as two."""
        ...

    @property
    def config_json(self) -> Mapping[str, Any]:
        """The checkpoint's, as it was read."""
        ...

    def weights(self) -> Iterator[tuple[str, WeightView]]:
        """The checkpoint's tensors by name, each read when it is asked for: for a program that lays them out itself.
        Nothing is built, so nothing is held twice."""
        ...

    def build(self, mesh: Mesh) -> StepModel:
        """Builds the layers of the mesh's rank on the platform and streams its weights. They ask the mesh for the axes
        that they use."""
        ...

    def tensors(self, model: StepModel) -> Sequence[HeldTensor]:
        """Every tensor that a built model holds, each once: for a program that moves them to its devices. What kernels
        packed is placed as their specs say; they may have moved it in `finish`."""
        ...

    def release(self, model: StepModel) -> int:
        """Gives back the memory of a built model's tensors, once a program has copied them to its device; returns the
        bytes. The model's shapes and backends stay; it must not be run again."""
        ...


class StepProgram:
    """Runs steps. A compiled program compiles nothing after warm_up."""

    def warm_up(self, keys: Sequence[ShapeKey]) -> CompileReport:
        return CompileReport(num_programs=0, seconds=0.0)

    def memory(self, key: ShapeKey) -> int:
        """Bytes that one step of this key needs beyond weights and KV."""
        return 0

    def initial_state(self, num_blocks: int, num_states: int = 0) -> State:
        """Fresh state with a pool of `num_blocks` blocks of tokens, and one of `num_states` where the plan has states,
        which is else not given; called before warm_up."""
        raise Unsupported("step program", ["initial_state is not implemented"])

    def edit(self, state: State, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> State:
        """Copies blocks of tokens (source, destination) in order, then zeroes some, in every layer that has them. A
        block to zero may be a copy's source: it was given up by one request and taken by another in the same step."""
        raise Unsupported("step program", ["edit is not implemented"])

    def copy_states(self, state: State, copies: Sequence[tuple[int, int]]) -> State:
        """Copies blocks of states (source, destination) in order, in every state layer."""
        raise Unsupported("step program", ["copy_states is not implemented"])

    def enter(self, state: State, rows: Sequence[EnteringRow]) -> State:
        """Replaces what the rows' slots hold for Ops.edit_logits: counts, and biases where the row has any. Called
        before the forward pass of the step in which a request with penalties or biases enters its slot, also anew."""
        raise Unsupported("step program", ["enter is not implemented"])

    def embed(self, state: State, rows: Sequence[EmbeddingRows]) -> State:
        """Writes the buffer of embeddings, before the forward pass of the step in which a request that brings some
        enters. Earlier steps may still read what they had there."""
        raise Unsupported("step program", ["embed is not implemented"])

    def forward(self, state: State, inputs: StepInputs) -> tuple[State, Hidden]:
        raise Unsupported("step program", ["forward is not implemented"])

    def taps(self, hidden: Hidden) -> Sequence[Tensor]:
        """Of a step with the feature TAPS: by layer of StepLimits.taps, the hidden states [num_tokens, hidden_size] of
        inputs.tap_tokens, on the device, in the model's dtype and whole on every rank. They hold until the next step's
        forward pass."""
        raise Unsupported("step program", ["taps is not implemented"])

    def sample(self, state: State, hidden: Hidden, late: SamplingInputs) -> tuple[State, StepOutputs]:
        """Draws a token for every sample; the one drawn by the last sample of a row that is kept stays in the state as
        its slot's last id. With the feature EDITS it draws from edited logits and counts what is kept for its slot."""
        raise Unsupported("step program", ["sample is not implemented"])

    def close(self) -> None:
        return None
