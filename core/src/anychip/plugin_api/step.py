"""The step seam: a program that runs whole steps over donated state.

Core itself implements the torch seam as a StepProgram (worker/torch_program), so both seams share one runner.
A step is forward(state, StepInputs), then sample(state, hidden, SamplingInputs); the state goes in and a new one
comes out, and the old one must not be used again.

The state holds the KV cache, each slot's last sampled id, and what penalties and biases edit logits by: counts
[max_slots + 1, vocab_size], bias ids and biases [max_slots + 1, MAX_BIASES]. `edit_state_bytes` says how much that is.
What goes into a step is declared in plugin_api/step_inputs, what comes out of it in plugin_api/step_outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from anychip.errors import Unsupported
from anychip.plugin_api.adapters import AdapterEntry, AdapterSite
from anychip.plugin_api.cache import CacheBackend
from anychip.plugin_api.cache_specs import CacheSpec
from anychip.plugin_api.forward_context import ForwardContext
from anychip.plugin_api.graph import ShapeKey
from anychip.plugin_api.mesh import Mesh, MeshShape
from anychip.plugin_api.sharding import HeldTensor
from anychip.plugin_api.step_inputs import EmbeddingRows, EnteringRow, SamplingInputs, StepInputs
from anychip.plugin_api.step_outputs import StepOutputs

if TYPE_CHECKING:
    from torch import Tensor

    from anychip.plugin_api.linear import WeightView
    from anychip.plugin_api.ops import Ops

State = Any
Hidden = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    num_programs: int
    seconds: float
    refused: str = ""
    """Why a shape that the policy has was not captured: steps keep their sizes then, and nothing is captured; "": all
    that was asked for could be."""


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

    # A model whose products take adapters lists them: adapter_sites (plugin_api.adapters.sites_of). Where its head
    # does, `adapts_head` is true, and logits takes the rows' StepAdapters behind `hidden`.


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

    @property
    def adapter_sites(self) -> Sequence[AdapterSite]:
        """The products that take adapters, as the first rank that the program runs has them."""
        return ()

    def adapt(self, state: State, entries: Sequence[AdapterEntry]) -> State:
        """Fills slots of adapters, before the forward pass of the first step that reads them. Earlier steps may still
        read what they had there."""
        raise Unsupported("step program", ["adapt is not implemented"])

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
