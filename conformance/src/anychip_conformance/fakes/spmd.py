"""fake-spmd: four devices driven by one process. Each holds a shard of the weights and of the KV cache; a thread
stands for each, and they meet in collectives, as the devices of one partitioned program do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from anychip.ops.reference import Drawn, EditState, Passed, blank_stacks, draw_tokens, write_adapters, write_embeddings
from anychip.plugin_api import (
    RECURRENCES,
    AdapterEntry,
    AdapterSite,
    AdapterStack,
    AttentionBackend,
    AttentionSpec,
    CacheBackend,
    Capabilities,
    Communicator,
    EmbeddingRows,
    EnteringRow,
    FusedMoE,
    GroupSpec,
    KVPlan,
    LatentBackend,
    LatentSpec,
    Mesh,
    MeshShape,
    ModelSource,
    MoESpec,
    Platform,
    ReadyOutputs,
    SamplingInputs,
    Scores,
    StateBackend,
    StateSpec,
    StepInputs,
    StepLimits,
    StepProgram,
    sites_of,
)
from anychip_conformance.fakes.functional import (
    DenseMoE,
    FunctionalAttention,
    chosen_scores,
    edited,
    forward_body,
    outputs,
    tensors,
)
from anychip_conformance.fakes.functional_sparse import functional_latent
from anychip_conformance.fakes.functional_states import FunctionalStates

R = TypeVar("R")
GroupOf = tuple[str, tuple[int, ...]]
"""An axis, and the ranks of one group along it."""


class Meeting:
    """Where the threads of one program exchange tensors: each puts its own, all see everybody's."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self._barrier = threading.Barrier(size, timeout=timeout_s)
        self._slots: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._slots[rank] = x
        self._barrier.wait()
        everybody = [slot for slot in self._slots if slot is not None]
        self._barrier.wait()  # nobody writes the next exchange before all have read this one
        return everybody

    def abort(self) -> None:
        """Wakes the others when one has failed."""
        self._barrier.abort()


class MeetingCommunicator(Communicator):
    name = "fake-spmd"

    def __init__(self, spec: GroupSpec, meeting: Meeting) -> None:
        super().__init__(spec)
        self._meeting = meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        # The same order on every device gives the same bits.
        return torch.stack(self._meeting.exchange(self.rank, x)).sum(dim=0)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._meeting.exchange(self.rank, x), dim=dim)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        return self._meeting.exchange(self.rank, x)[root]

    def barrier(self) -> None:
        self._meeting.exchange(self.rank, torch.empty(0))


class SpmdPlatform(Platform):
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "bfloat16"}),
        kv_dtypes=frozenset({"float32", "bfloat16"}),
        block_sizes=FunctionalAttention.block_sizes,
        kv_write="functional",
        collectives="compiler",
        stale_kv="must_be_finite",
        mla=True,
        sparse_latent=True,
        recurrences=frozenset(RECURRENCES),
        lora=True,
    )

    def state(self, spec: StateSpec) -> StateBackend:
        self.check(spec)
        return FunctionalStates(spec)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return FunctionalAttention(spec)

    def latent(self, spec: LatentSpec) -> LatentBackend:
        self.check(spec)
        return functional_latent(spec)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        return DenseMoE(spec, self)

    def kv_budget(self, profile: object) -> int:
        return 2**26

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> StepProgram:
        return SpmdStepProgram(model, kv, limits, self.device_mesh)


@dataclass(slots=True)
class SpmdState:
    """By device, then by layer; last ids, edits and embeddings are replicated."""

    caches: list[list[Tensor]]
    last_ids: list[Tensor]
    edits: list[EditState]
    embeddings: list[Tensor]
    adapters: list[list[AdapterStack]]
    """By device, then by site: each has its share of every adapter."""


@dataclass(slots=True)
class SpmdHidden:
    logits: list[Tensor]
    slots: Tensor
    scores: Scores | None
    passed: Passed  # the first device's


class SpmdStepProgram(StepProgram):
    def __init__(self, source: ModelSource, kv: KVPlan, limits: StepLimits, shape: MeshShape) -> None:
        self._meetings: dict[GroupOf, Meeting] = {}
        self._pool = ThreadPoolExecutor(shape.size, thread_name_prefix="fake-spmd")
        self._ranks = tuple(range(shape.size))
        self.kv = kv
        self.limits = limits
        self.ops = source.ops
        self.vocab_size = source.vocab_size
        self.models = [source.build(self.mesh(shape, rank)) for rank in self._ranks]

    def mesh(self, shape: MeshShape, rank: int) -> Mesh:
        """The mesh as one device sees it."""
        return Mesh(shape, rank, self.communicator)

    def communicator(self, group: GroupSpec) -> Communicator:
        """Devices of one group meet, and those of other groups, along this axis or another, elsewhere."""
        meeting = self._meetings.setdefault((group.purpose, group.ranks), Meeting(group.size, timeout_s=60.0))
        return MeetingCommunicator(group, meeting)

    def initial_state(self, num_blocks: int, num_states: int = 0) -> SpmdState:
        def cache(layer: int, backend: CacheBackend) -> Tensor:
            if isinstance(backend, StateBackend):
                raw = torch.zeros(num_states * backend.state_bytes(), dtype=torch.uint8)
                return backend.make_cache(raw, num_states)
            raw, size = torch.zeros(num_blocks * self.kv.page_bytes, dtype=torch.uint8), self.kv.block_sizes
            return backend.make_cache(raw, num_blocks, size[self.kv.layer_groups[layer]])  # type: ignore[attr-defined]

        def caches(rank: int) -> list[Tensor]:
            return [cache(layer, backend) for layer, backend in enumerate(self.models[rank].attention)]

        last_ids = torch.zeros(self.limits.max_slots + 1, dtype=torch.int32)
        return SpmdState(
            [caches(rank) for rank in self._ranks],
            [last_ids.clone() for _ in self._ranks],
            [EditState.blank(self.limits.max_slots, self.vocab_size) for _ in self._ranks],
            [torch.zeros(self.limits.max_embeddings, self.models[0].hidden_size) for _ in self._ranks],
            [self._new_stacks(rank) for rank in self._ranks],
        )

    def _sites(self, rank: int) -> Sequence[AdapterSite]:
        return sites_of(self.models[rank]) if self.limits.max_adapters else ()

    def _new_stacks(self, rank: int) -> list[AdapterStack]:
        def empty(shape: Sequence[int], dtype: str) -> Tensor:
            return torch.empty(tuple(shape), dtype=getattr(torch, dtype))

        return blank_stacks(self._sites(rank), self.limits.max_adapters, self.limits.max_adapter_rank, empty)

    def edit(self, state: SpmdState, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> SpmdState:
        def one(rank: int) -> None:
            for layer, backend in enumerate(self.models[rank].attention):
                if not isinstance(backend, StateBackend):  # only blocks of tokens are copied and cleared
                    state.caches[rank][layer] = edited(backend, state.caches[rank][layer], copies, zeros)

        self._on_every_device(one)
        return state

    def copy_states(self, state: SpmdState, copies: Sequence[tuple[int, int]]) -> SpmdState:
        def one(rank: int) -> None:
            for layer, backend in enumerate(self.models[rank].attention):
                if isinstance(backend, StateBackend):
                    state.caches[rank][layer] = edited(backend, state.caches[rank][layer], copies, [])

        self._on_every_device(one)
        return state

    def enter(self, state: SpmdState, rows: Sequence[EnteringRow]) -> SpmdState:
        self._on_every_device(lambda rank: state.edits[rank].enter(rows))
        return state

    def embed(self, state: SpmdState, rows: Sequence[EmbeddingRows]) -> SpmdState:
        self._on_every_device(lambda rank: write_embeddings(state.embeddings[rank], rows))
        return state

    @property
    def adapter_sites(self) -> Sequence[AdapterSite]:
        return self._sites(0)

    def adapt(self, state: SpmdState, entries: Sequence[AdapterEntry]) -> SpmdState:
        self._on_every_device(lambda rank: write_adapters(state.adapters[rank], self._sites(rank), entries))
        return state

    def taps(self, hidden: SpmdHidden) -> Sequence[Tensor]:
        return hidden.passed.taps

    def forward(self, state: SpmdState, inputs: StepInputs) -> tuple[SpmdState, SpmdHidden]:
        fields = tensors(inputs.arena, inputs.sections)

        def one(rank: int) -> Passed:
            return forward_body(
                self.models[rank], self.ops, self.kv, state.caches[rank], state.last_ids[rank], fields,
                tap_layers=self.limits.taps, embeddings=state.embeddings[rank], stacks=state.adapters[rank],
            )  # fmt: skip

        results = self._on_every_device(one)
        scores = chosen_scores(results[0].scores, inputs.score_targets)
        logits = [result.logits for result in results]
        state = replace(state, caches=[result.caches for result in results])
        return state, SpmdHidden(logits, fields["sample_slots"], scores, results[0])

    def sample(self, state: SpmdState, hidden: SpmdHidden, late: SamplingInputs) -> tuple[SpmdState, ReadyOutputs]:
        fields = tensors(late.arena, late.sections)

        def one(rank: int) -> Drawn:
            return draw_tokens(
                self.ops,
                hidden.logits[rank].float(),
                fields,
                slots=hidden.slots,
                last_ids=state.last_ids[rank],
                edits=state.edits[rank],
                features=late.key.features,
                max_drafts=self.limits.max_drafts,
            )

        drawn = self._on_every_device(one)
        for edits, mine in zip(state.edits, drawn, strict=True):
            edits.counts = mine.counts
        state = replace(state, last_ids=[mine.last_ids for mine in drawn])
        return state, outputs(drawn[0].outputs(), late.num_samples, hidden.scores, hidden.passed.pooled)

    def _on_every_device(self, fn: Callable[[int], R]) -> list[R]:
        def guarded(rank: int) -> R:
            try:
                with torch.inference_mode():
                    return fn(rank)
            except BaseException:
                for meeting in self._meetings.values():
                    meeting.abort()
                raise

        return [future.result() for future in [self._pool.submit(guarded, rank) for rank in self._ranks]]

    def close(self) -> None:
        self._pool.shutdown()
