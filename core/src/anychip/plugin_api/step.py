"""The step seam: a program that runs whole steps over donated state.

Core itself implements the torch seam as a StepProgram (worker/torch_program), so both seams share one runner.
A step is forward(state, StepInputs), then sample(state, hidden, LateInputs); the state goes in and a new one
comes out, and the old one must not be used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from anychip.errors import Unsupported
from anychip.plugin_api.attention import AttentionBackend, AttentionLayer, AttentionSpec, QKNorm, Rope
from anychip.plugin_api.communicator import Communicator
from anychip.plugin_api.graph import Apart, ShapeKey

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from anychip.plugin_api.linear import WeightView
    from anychip.plugin_api.ops import Ops

State = Any
Hidden = Any

MAX_LOGPROBS = 20
"""Most likely tokens reported per row, whatever fewer a request asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Where one array lies in an arena."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """Host arrays of one step, padded to `key`. All lie in one buffer, `arena`, so that one copy moves them.

    An input id of -1 means: the slot's last sampled token, which only the device knows yet.
    Padded tokens have id 0, position 0, row 0 and slot mapping PADDING_SLOT; padded rows have length 0 and slot
    `max_slots`, one past the real ones.
    """

    key: ShapeKey
    staged: np.ndarray  # uint8: the arena, and behind it the one of the step's SamplingInputs
    arena: np.ndarray  # uint8
    sections: Mapping[str, Section]  # by array: the fields' names, block_table_<group>, slot_mapping_<group>
    input_ids: np.ndarray  # [num_tokens] int32
    positions: np.ndarray  # [num_tokens] int32
    token_slots: np.ndarray  # [num_tokens] int32, the persistent slot of each token's request
    query_start: np.ndarray  # [num_reqs + 1] int32
    seq_lens: np.ndarray  # [num_reqs] int32
    logits_indices: np.ndarray  # [num_reqs] int32, token whose hidden state is sampled from; padded with 0
    sample_slots: np.ndarray  # [num_reqs] int32, slot of each sampling row
    block_tables: tuple[np.ndarray, ...]  # by KV group: [num_reqs, num_pages] int32
    slot_mappings: tuple[np.ndarray, ...]  # by KV group: [num_tokens] of the declared slot dtype
    score_targets: np.ndarray | None  # [num_tokens] int32, with SCORES: the id to score after a token; -1: none
    num_rows: int  # unpadded
    num_tokens: int
    num_samples: int
    max_query_len: int


@dataclass(slots=True, kw_only=True)
class SamplingInputs:
    """By sampling row, padded to key.num_reqs: what drawing a token needs. Lies in one buffer, `arena`.

    `masks` is a packed bitmask of allowed tokens, bit i of word i // 32 for token i; None when no row has one.
    `edit_*` are what Ops.edit_logits takes, applied before the masks; None when no row has any.
    `staged_at` is where the arena begins in StepInputs.staged, so that a device which copied that has it already; None
    when masks or edits came late and it is a buffer of its own.
    """

    key: ShapeKey
    arena: np.ndarray  # uint8
    sections: Mapping[str, Section]
    temperature: np.ndarray  # [num_reqs] float32; 0 is greedy
    top_p: np.ndarray  # [num_reqs] float32
    min_p: np.ndarray  # [num_reqs] float32
    top_k: np.ndarray  # [num_reqs] int32; 0: all
    seed_low: np.ndarray  # [num_reqs] int32, the low 32 bits of the seed
    seed_high: np.ndarray  # [num_reqs] int32
    sample_index: np.ndarray  # [num_reqs] int32, which of a request's n sequences
    position: np.ndarray  # [num_reqs] int32, of the token to be drawn
    masks: np.ndarray | None  # [num_reqs, ceil(vocab_size / 32)] int32
    edit_ids: np.ndarray | None  # [num_reqs, width] int32
    edit_scales: np.ndarray | None  # [num_reqs, width] float32
    edit_shifts: np.ndarray | None  # [num_reqs, width] float32
    num_samples: int
    all_greedy: bool
    staged_at: int | None


@dataclass(slots=True, kw_only=True)
class Scores:
    """Of the step's tokens that had a target, in their order."""

    logprobs: np.ndarray  # [num_scored] of the targets
    top_ids: np.ndarray  # [num_scored, MAX_LOGPROBS]
    top_logprobs: np.ndarray


@dataclass(slots=True, kw_only=True)
class HostOutputs:
    """What a step produced, on the host. Logprobs and scores are present when the features asked for them."""

    token_ids: np.ndarray  # [num_samples, tokens per row]
    chosen_logprobs: np.ndarray | None = None  # [num_samples]
    top_ids: np.ndarray | None = None  # [num_samples, MAX_LOGPROBS]
    top_logprobs: np.ndarray | None = None
    scores: Scores | None = None


class StepOutputs(Protocol):
    """A step's results on their way to the host."""

    def fetch(self) -> HostOutputs:
        """Waits for this step, and for no later one."""
        ...


@dataclass(frozen=True, slots=True)
class ReadyOutputs:
    """StepOutputs that are on the host already."""

    host: HostOutputs

    def fetch(self) -> HostOutputs:
        return self.host


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
    apart: Apart | None = None
    """Of a capture in pieces: attention runs between them."""

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
        if self.apart is None:
            plan = self.plans[group]
            attended, caches[index] = backend.forward(q, k, v, caches[index], plan, layer, rope=rope, qk_norm=qk_norm)
            return attended

        def call(plans: Sequence[Any], out: Tensor | None) -> Tensor:
            attended, caches[index] = backend.forward(
                q, k, v, caches[index], plans[group], layer, rope=rope, qk_norm=qk_norm, out=out
            )
            return attended

        return self.apart(call)


class StepModel(Protocol):
    """A model with its weights, on one rank."""

    num_layers: int
    vocab_size: int

    @property
    def attention(self) -> Sequence[AttentionBackend]:
        """By layer."""
        ...

    def forward(self, input_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states [num_tokens, hidden_size]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, vocab_size], whole on every rank."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's share of a model, and how it talks with the others."""

    rank: int
    size: int
    communicator: Communicator


class ModelSource(Protocol):
    """A checkpoint that can be built for any shard: what step_program is given."""

    architecture: str
    vocab_size: int
    ops: Ops

    def attention_specs(self, size: int) -> Sequence[AttentionSpec]:
        """By layer, for one of `size` shards; needs no weights."""
        ...

    @property
    def config_json(self) -> Mapping[str, Any]:
        """The checkpoint's, as it was read."""
        ...

    def weights(self) -> Iterator[tuple[str, WeightView]]:
        """The checkpoint's tensors by name, each read when it is asked for: for a program that lays them out itself.
        Nothing is built, so nothing is held twice."""
        ...

    def build(self, shard: Shard) -> StepModel:
        """Builds the shard's layers on the platform and streams its weights."""
        ...

    def release(self, model: StepModel) -> int:
        """Gives back the memory of a built model's tensors, once a program has copied them to its device; returns the
        bytes. The model's shapes and backends stay; it must not be run again."""
        ...


@dataclass(slots=True, kw_only=True)
class KVPlan:
    """The KV cache as core laid it out: which layers form a group, and which share a buffer of the pool."""

    block_sizes: tuple[int, ...]  # by group
    layer_groups: tuple[int, ...]  # by layer
    layer_buffers: tuple[int, ...]  # by layer
    num_buffers: int
    page_bytes: int
    """Of one block in one buffer."""
    specs: tuple[AttentionSpec, ...]  # by group

    @property
    def block_bytes(self) -> int:
        """Of one block in all buffers."""
        return self.page_bytes * self.num_buffers


class StepProgram:
    """Runs steps. zero compilations after warm_up is the promise of a compiled one."""

    def warm_up(self, keys: Sequence[ShapeKey]) -> CompileReport:
        return CompileReport(num_programs=0, seconds=0.0)

    def memory(self, key: ShapeKey) -> int:
        """Bytes that one step of this key needs beyond weights and KV."""
        return 0

    def initial_state(self, num_blocks: int) -> State:
        """Fresh state with a KV pool of `num_blocks`; called before warm_up."""
        raise Unsupported("step program", ["initial_state is not implemented"])

    def edit(self, state: State, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> State:
        """Copies blocks (source, destination) in order, then zeroes blocks, in every layer. A block to zero may be
        a copy's source: it was given up by one request and taken by another in the same step."""
        raise Unsupported("step program", ["edit is not implemented"])

    def forward(self, state: State, inputs: StepInputs) -> tuple[State, Hidden]:
        raise Unsupported("step program", ["forward is not implemented"])

    def sample(self, state: State, hidden: Hidden, late: SamplingInputs) -> tuple[State, StepOutputs]:
        """Draws a token for every sampling row and keeps it in the state as its slot's last id."""
        raise Unsupported("step program", ["sample is not implemented"])

    def close(self) -> None:
        return None
