"""fake-static: a device that runs compiled steps only.

A compiled step is a tape of ops, recorded for one ShapeKey: it refuses any other shape, cannot read a value on the
host, and takes its state by donation. Compilations are counted; after warm_up there must be none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anychip.ops.reference import EditState, Passed, blank_stacks, draw_tokens, write_adapters, write_embeddings
from anychip.plugin_api import (
    ADAPTERS,
    DRAFTS,
    RECURRENCES,
    AdapterEntry,
    AdapterSite,
    AdapterStack,
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    CompileReport,
    EmbeddingRows,
    EnteringRow,
    FusedMoE,
    KVPlan,
    LatentBackend,
    LatentSpec,
    Mesh,
    ModelSource,
    MoESpec,
    Platform,
    ReadyOutputs,
    SamplingInputs,
    Scores,
    ShapeKey,
    ShapePolicy,
    StateBackend,
    StateSpec,
    StepInputs,
    StepLimits,
    StepProgram,
    StepRules,
    forward_features,
    sampling_features,
    sites_of,
)
from anychip.plugin_api.step_layout import blank_sampling_inputs, blank_step_inputs
from anychip_conformance.fakes.compiled import CompiledCall, UncompiledShape
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

_MAX_TOKENS = 64
_MAX_ROWS = 16
_SHAPES = ((16, 16), (_MAX_TOKENS, 16))
"""(tokens, rows) of the compiled steps."""


class DonatedTwice(RuntimeError):
    """A state was used after it had been given away."""


@dataclass(slots=True)
class Held:
    caches: list[Tensor]  # by layer
    last_ids: Tensor  # [max_slots + 1]
    edits: EditState
    embeddings: Tensor  # [max_embeddings, hidden_size]
    adapters: list[AdapterStack]  # by site


class DonatedState:
    """Tensors that one call may take."""

    def __init__(self, held: Held) -> None:
        self._held: Held | None = held

    def take(self) -> Held:
        if self._held is None:
            raise DonatedTwice("this state was donated to an earlier step")
        held, self._held = self._held, None
        return held


@dataclass(slots=True)
class StaticHidden:
    logits: Tensor
    slots: Tensor
    scores: Scores | None
    pooled: Tensor | None = None
    taps: tuple[Tensor, ...] = ()


class StaticShapes(ShapePolicy):
    def __init__(self, limits: StepLimits) -> None:
        self._pages = max(limits.max_pages, default=1)
        # With drafts, every token of a step may be a sample.
        self._keys = [
            ShapeKey(num_tokens=tokens, num_reqs=rows, num_samples=samples, max_query_len=tokens, num_pages=self._pages)
            for tokens, rows in _SHAPES
            for samples in ([rows] if limits.max_drafts == 0 or tokens == rows else [rows, tokens])
        ]

    def keys(self) -> Sequence[ShapeKey]:
        return self._keys

    def bucket(
        self,
        *,
        num_tokens: int,
        num_reqs: int,
        num_samples: int,
        max_query_len: int,
        num_pages: int,
        features: tuple[str, ...],
    ) -> ShapeKey:
        for key in self._keys:
            if num_tokens <= key.num_tokens and num_reqs <= key.num_reqs and num_samples <= key.num_samples:
                return replace(key, features=features)
        raise UncompiledShape(
            f"{num_tokens} tokens in {num_reqs} rows, {num_samples} samples; the largest step is {self._keys[-1]}"
        )


class StaticPlatform(Platform):
    capabilities = Capabilities(
        dtypes=frozenset({"float32", "bfloat16"}),
        kv_dtypes=frozenset({"float32", "bfloat16"}),
        # Weights alone: it rounds no activations.
        quantization=frozenset({"int8", "int4", "fp8-w8a16", "mxfp4"}),
        block_sizes=FunctionalAttention.block_sizes,
        kv_write="functional",
        attention_lse=True,
        stale_kv="must_be_finite",
        mla=True,
        sparse_latent=True,
        recurrences=frozenset(RECURRENCES),
        lora=True,
    )
    step_rules = StepRules(max_tokens=_MAX_TOKENS, max_rows=_MAX_ROWS)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        self.check(spec)
        return FunctionalAttention(spec)

    def latent(self, spec: LatentSpec) -> LatentBackend:
        self.check(spec)
        return functional_latent(spec)

    def state(self, spec: StateSpec) -> StateBackend:
        self.check(spec)
        return FunctionalStates(spec)

    def moe(self, spec: MoESpec) -> FusedMoE:
        self.check(spec)
        return DenseMoE(spec, self)

    def kv_budget(self, profile: object) -> int:
        return 2**26

    def shape_policy(self, limits: StepLimits) -> ShapePolicy:
        return StaticShapes(limits)

    def step_program(self, model: ModelSource, kv: KVPlan, limits: StepLimits) -> StepProgram:
        return StaticStepProgram(model, kv, limits)


class StaticStepProgram(StepProgram):
    def __init__(self, source: ModelSource, kv: KVPlan, limits: StepLimits) -> None:
        self.model = source.build(Mesh.alone())
        self.ops = source.ops
        self.vocab_size = source.vocab_size
        self.kv = kv
        self.limits = limits
        self.num_compilations = 0
        self._steps: dict[ShapeKey, CompiledCall] = {}
        self._samplers: dict[tuple[int, tuple[str, ...]], CompiledCall] = {}

    def initial_state(self, num_blocks: int, num_states: int = 0) -> DonatedState:
        self._num_blocks, self._num_states = num_blocks, num_states
        last_ids = torch.zeros(self.limits.max_slots + 1, dtype=torch.int32)
        edits = EditState.blank(self.limits.max_slots, self.vocab_size)
        embeddings = torch.zeros(self.limits.max_embeddings, self.model.hidden_size)
        return DonatedState(Held(self._new_caches(), last_ids, edits, embeddings, self._new_stacks()))

    def _new_stacks(self) -> list[AdapterStack]:
        def empty(shape: Sequence[int], dtype: str) -> Tensor:
            return torch.empty(tuple(shape), dtype=getattr(torch, dtype))

        return blank_stacks(self.adapter_sites, self.limits.max_adapters, self.limits.max_adapter_rank, empty)

    def _new_caches(self) -> list[Tensor]:
        # Functional caches cannot share a buffer between groups: each layer has its own.
        caches = []
        for layer, backend in enumerate(self.model.attention):
            if isinstance(backend, StateBackend):
                raw = torch.zeros(self._num_states * backend.state_bytes(), dtype=torch.uint8)
                caches.append(backend.make_cache(raw, self._num_states))
                continue
            size = self.kv.block_sizes[self.kv.layer_groups[layer]]
            raw = torch.zeros(self._num_blocks * self.kv.page_bytes, dtype=torch.uint8)
            caches.append(backend.make_cache(raw, self._num_blocks, size))
        return caches

    def warm_up(self, keys: Sequence[ShapeKey]) -> CompileReport:
        start = time.perf_counter()
        for key in keys:
            for features in forward_features(self.limits):
                self._compile_step(replace(key, features=features))
            for features in sampling_features(self.limits.max_drafts):
                # Only with drafts are there more samples than rows.
                wanted = DRAFTS in features or key.num_samples <= key.num_reqs
                if wanted and (key.num_samples, features) not in self._samplers:
                    self._compile_sampler(replace(key, features=features))
        return CompileReport(num_programs=self.num_compilations, seconds=time.perf_counter() - start)

    @torch.inference_mode()
    def _compile_step(self, key: ShapeKey) -> None:
        blank = blank_step_inputs(
            key,
            num_groups=len(self.kv.block_sizes),
            slot_dtype="int64",
            max_slots=self.limits.max_slots,
            states=bool(self.kv.states),
        )
        fields = tensors(blank.arena, blank.sections)
        names = list(fields)

        def step(
            caches: list[Tensor], last_ids: Tensor, embeddings: Tensor, adapters: list[list[Tensor]], *values: Tensor
        ) -> tuple[object, ...]:
            given = dict(zip(names, values, strict=True))
            sites = self.adapter_sites if adapters else ()
            stacks = [AdapterStack.of(site, tensors) for site, tensors in zip(sites, adapters, strict=True)]
            return forward_body(
                self.model, self.ops, self.kv, caches, last_ids, given,
                tap_layers=self.limits.taps, embeddings=embeddings, stacks=stacks,
            ).flat()  # fmt: skip

        held = self.initial_state(self._num_blocks, self._num_states).take()
        example = (held.caches, held.last_ids, held.embeddings, self._stacks_of(held, key), *fields.values())
        self._steps[key] = self._compile(step, example)

    @staticmethod
    def _stacks_of(held: Held, key: ShapeKey) -> list[list[Tensor]]:
        """A step without adapters is not given any."""
        return [list(stack.tensors) for stack in held.adapters] if ADAPTERS in key.features else []

    @torch.inference_mode()
    def _compile_sampler(self, key: ShapeKey) -> None:
        blank = blank_sampling_inputs(key, self.vocab_size)
        fields = tensors(blank.arena, blank.sections)
        names = list(fields)

        def draw(
            last_ids: Tensor, edits: Sequence[Tensor], logits: Tensor, slots: Tensor, *values: Tensor
        ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            drawn = draw_tokens(
                self.ops, logits, dict(zip(names, values, strict=True)), slots=slots, last_ids=last_ids,
                edits=EditState(*edits), features=key.features, max_drafts=self.limits.max_drafts,
            )  # fmt: skip
            return drawn.last_ids, drawn.counts, drawn.outputs()

        samples, slots = key.num_samples, self.limits.max_slots
        example = (
            torch.zeros(slots + 1, dtype=torch.int32),
            _tensors_of(EditState.blank(slots, self.vocab_size)),
            torch.zeros(samples, self.vocab_size, dtype=torch.float32),
            torch.zeros(samples, dtype=torch.int32),
            *fields.values(),
        )
        self._samplers[samples, key.features] = self._compile(draw, example)

    def _compile(self, fn: Callable[..., object], example: tuple[object, ...]) -> CompiledCall:
        self.num_compilations += 1
        return CompiledCall(fn, example)

    @torch.inference_mode()
    def edit(self, state: DonatedState, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> DonatedState:
        held = state.take()
        for layer, backend in enumerate(self.model.attention):
            if not isinstance(backend, StateBackend):  # only blocks of tokens are copied and cleared
                held.caches[layer] = edited(backend, held.caches[layer], copies, zeros)
        return DonatedState(held)

    @torch.inference_mode()
    def copy_states(self, state: DonatedState, copies: Sequence[tuple[int, int]]) -> DonatedState:
        held = state.take()
        for layer, backend in enumerate(self.model.attention):
            if isinstance(backend, StateBackend):
                held.caches[layer] = edited(backend, held.caches[layer], copies, [])
        return DonatedState(held)

    @torch.inference_mode()
    def enter(self, state: DonatedState, rows: Sequence[EnteringRow]) -> DonatedState:
        held = state.take()
        held.edits.enter(rows)
        return DonatedState(held)

    @torch.inference_mode()
    def embed(self, state: DonatedState, rows: Sequence[EmbeddingRows]) -> DonatedState:
        held = state.take()
        write_embeddings(held.embeddings, rows)
        return DonatedState(held)

    @property
    def adapter_sites(self) -> Sequence[AdapterSite]:
        return sites_of(self.model) if self.limits.max_adapters else ()

    @torch.inference_mode()
    def adapt(self, state: DonatedState, entries: Sequence[AdapterEntry]) -> DonatedState:
        held = state.take()
        write_adapters(held.adapters, self.adapter_sites, entries)
        return DonatedState(held)

    def taps(self, hidden: StaticHidden) -> Sequence[Tensor]:
        return hidden.taps

    @torch.inference_mode()
    def forward(self, state: DonatedState, inputs: StepInputs) -> tuple[DonatedState, StaticHidden]:
        step = self._steps.get(inputs.key)
        if step is None:
            raise UncompiledShape(f"no compiled step for {inputs.key}")
        held = state.take()
        fields = tensors(inputs.arena, inputs.sections)
        stacks = self._stacks_of(held, inputs.key)
        passed = Passed.of(step(held.caches, held.last_ids, held.embeddings, stacks, *fields.values()))
        scores = chosen_scores(passed.scores, inputs.score_targets)
        hidden = StaticHidden(passed.logits, fields["sample_slots"], scores, passed.pooled, passed.taps)
        return DonatedState(replace(held, caches=passed.caches)), hidden

    @torch.inference_mode()
    def sample(
        self, state: DonatedState, hidden: StaticHidden, late: SamplingInputs
    ) -> tuple[DonatedState, ReadyOutputs]:
        draw = self._samplers.get((late.key.num_samples, late.key.features))
        if draw is None:
            raise UncompiledShape(f"no compiled sampler for {late.key}")
        held = state.take()
        fields, edits = tensors(late.arena, late.sections), _tensors_of(held.edits)
        last_ids, counts, drawn = draw(held.last_ids, edits, hidden.logits.float(), hidden.slots, *fields.values())
        held = replace(held, last_ids=last_ids, edits=replace(held.edits, counts=counts))
        return DonatedState(held), outputs(drawn, late.num_samples, hidden.scores, hidden.pooled)


def _tensors_of(edits: EditState) -> list[Tensor]:
    return [edits.counts, edits.bias_ids, edits.biases]
