"""The torch seam as a StepProgram: core runs the model, the platform's kernels do the work, graphs where it has any."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import EditState, arena_views, draw_tokens
from anychip.plugin_api import (
    MAX_LOGPROBS,
    Communicator,
    CompileReport,
    EnteringRow,
    ForwardContext,
    GraphLevel,
    KVPlan,
    Ops,
    PagedBackend,
    Platform,
    Recorder,
    RunOutsideGraph,
    SamplingInputs,
    ShapeKey,
    StateBackend,
    StepInputs,
    StepLimits,
    StepModel,
    StepOutputs,
    StepProgram,
)
from anychip.plugin_api.step_layout import batch_view, blank_step_inputs, sampling_layout, staged_size, state_view
from anychip.worker.captured import Captured, CapturedPieces, CapturedStep
from anychip.worker.torch_outputs import SCORE_NAMES, TorchOutputs

_SCORED_AT_ONCE = 128
"""Prompt tokens whose logits exist at once."""


@dataclass(slots=True)
class TorchState:
    caches: list[object]  # by layer
    last_ids: Tensor  # [max_slots + 1] int32; the extra one takes what padded rows sample
    edits: EditState


@dataclass(slots=True)
class TorchHidden:
    logits: Tensor | None  # [num_samples, vocab_size]; None when no row samples
    sample_slots: Tensor  # [num_samples]
    draws: Mapping[str, Tensor]  # the arrays of SamplingInputs that were staged with the step
    scores: tuple[Tensor, ...] = ()  # by scored token: log-probability, the likeliest ids and theirs


class TorchStepProgram(StepProgram):
    """`communicators` are those that the model's layers use: a capture must know them. `pieces` are the numbers of
    tokens of steps that are captured in pieces."""

    def __init__(
        self,
        *,
        platform: Platform,
        model: StepModel,
        ops: Ops,
        kv: KVPlan,
        limits: StepLimits,
        communicators: Sequence[Communicator],
        pieces: Sequence[int] = (),
    ) -> None:
        self.platform = platform
        self.model = model
        self.ops = ops
        self.kv = kv
        self.limits = limits
        self.communicators = communicators
        self.pieces = pieces
        self.device = platform.default_device
        self.graphs = platform.graph_capture()
        self._steps = Captured(self._capture)
        self._pieces = Captured(self._capture_pieces)
        # Taken before anything is measured: what is left for the KV cache is without it.
        self._edits = EditState.blank(limits.max_slots, model.vocab_size, self.device)
        states = {layer: backend for layer, backend in enumerate(model.attention) if isinstance(backend, StateBackend)}
        self._states: dict[int, StateBackend] = states  # by layer, as the next
        self._paged = {
            layer: cast(PagedBackend, backend) for layer, backend in enumerate(model.attention) if layer not in states
        }
        self._first_layer = [kv.layer_groups.index(group) for group in range(len(kv.specs) + len(kv.states))]

    # -- preparation --------------------------------------------------------------------------------------

    def initial_state(self, num_blocks: int, num_states: int = 0) -> TorchState:
        buffers = [self.platform.allocate(num_blocks * self.kv.page_bytes, "kv") for _ in range(self.kv.num_buffers)]
        caches: list[object] = [None] * len(self.model.attention)
        for layer, backend in self._paged.items():
            size = self.kv.block_sizes[self.kv.layer_groups[layer]]
            caches[layer] = backend.make_cache(buffers[self.kv.layer_buffers[layer]], num_blocks, size)
        for layer, states in self._states.items():
            caches[layer] = states.make_cache(
                self.platform.allocate(num_states * states.state_bytes(), "kv"), num_states
            )
        last_ids = torch.zeros(self.limits.max_slots + 1, dtype=torch.int32, device=self.device)
        self._state = TorchState(caches, last_ids, self._edits)
        return self._state

    @torch.inference_mode()
    def warm_up(self, keys: Sequence[ShapeKey]) -> CompileReport:
        """Captures a graph for each key, and pieces for each number of tokens that has them, largest first so that
        later ones fit in its memory; of those that may wait, the smallest, which shows at the start that capturing
        works."""
        start = time.perf_counter()
        keys = sorted(keys, key=lambda k: -k.num_tokens) if self.graphs.level >= GraphLevel.FULL else ()
        pieces = sorted(self.pieces, reverse=True) if self.graphs.level >= GraphLevel.PIECEWISE else ()
        if self.graphs.lazy:
            self._steps.later(keys[:-1])
            self._pieces.later(pieces[:-1])
            keys, pieces = keys[-1:], pieces[-1:]
        self._steps.now(keys)
        self._pieces.now(pieces)
        num_programs = len(self._steps.made) + len(self._pieces.made)
        return CompileReport(num_programs=num_programs, seconds=time.perf_counter() - start)

    @torch.inference_mode()
    def edit(self, state: TorchState, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> TorchState:
        for layer, backend in self._paged.items():
            cache = state.caches[layer]
            # In order: a copy's destination may be a later copy's source, and its source a block to zero.
            for source, destination in copies:
                cache = backend.copy_blocks(cache, [source], [destination])
            if zeros:
                cache = backend.zero_blocks(cache, zeros)
            state.caches[layer] = cache
        return state

    @torch.inference_mode()
    def enter(self, state: TorchState, rows: Sequence[EnteringRow]) -> TorchState:
        state.edits.enter(rows)
        return state

    # -- a step -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, state: TorchState, inputs: StepInputs) -> tuple[TorchState, TorchHidden]:
        captured = self._steps.get(inputs.key)
        if captured is not None:
            captured.staged.copy_(torch.from_numpy(inputs.staged), non_blocking=True)
            plans = self._plans(inputs, captured.fields, into=captured.plans)
            logits = self.graphs.run(captured.handle, plans)
            return state, TorchHidden(logits, captured.fields["sample_slots"], captured.draws)
        staged = torch.from_numpy(inputs.staged).to(self.device, non_blocking=True)
        fields = arena_views(staged, inputs.sections)
        plans = self._plans(inputs, fields)
        rows = fields["logits_indices"][: inputs.num_samples]
        hidden = self._in_pieces(state, fields, plans)
        if hidden is None:
            hidden = self.model.forward(_known_ids(state, fields), fields["positions"], self._context(state, plans))
        scores = () if inputs.score_targets is None else self._scores(hidden, inputs.score_targets)
        slots = fields["sample_slots"][: inputs.num_samples]
        return state, TorchHidden(self._logits(hidden, rows), slots, _staged_draws(staged, inputs), scores)

    def _context(
        self, state: TorchState, plans: Sequence[object], run_outside_graph: RunOutsideGraph | None = None
    ) -> ForwardContext:
        return ForwardContext(plans, state.caches, self.kv.layer_groups, run_outside_graph)

    def _in_pieces(self, state: TorchState, fields: Mapping[str, Tensor], plans: Sequence[object]) -> Tensor | None:
        """None where no pieces are captured for so many tokens."""
        pieces = self._pieces.get(len(fields["input_ids"]))
        if pieces is None:
            return None
        pieces.ids.copy_(_known_ids(state, fields))
        pieces.positions.copy_(fields["positions"])
        hidden: Tensor = self.graphs.run_pieces(pieces.handle, plans)
        return hidden

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor | None:
        return self.model.logits(hidden[rows]) if len(rows) else None

    def _scores(self, hidden: Tensor, targets: np.ndarray) -> tuple[Tensor, ...]:
        """In parts, so that the logits of a whole chunk of prompt never exist at once."""
        scored = np.flatnonzero(targets >= 0)
        parts = []
        for start in range(0, len(scored), _SCORED_AT_ONCE):
            tokens = scored[start : start + _SCORED_AT_ONCE]
            wanted = torch.from_numpy(targets[tokens]).to(self.device)
            logits = self.model.logits(hidden[torch.from_numpy(tokens).to(self.device)]).float()
            parts.append(self.ops.logprobs(logits=logits, token_ids=wanted, num_top=MAX_LOGPROBS))
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def _plans(
        self,
        inputs: StepInputs,
        fields: Mapping[str, Tensor],
        *,
        into: Sequence[object] | None = None,
        recorder: Recorder | None = None,
    ) -> list[object]:
        host_lengths = self.platform.capabilities.host_lengths
        plans: list[object] = []
        for group, size in enumerate(self.kv.block_sizes):
            batch = batch_view(inputs, fields, group=group, block_size=size, host_lengths=host_lengths)
            backend = self._paged[self._first_layer[group]]
            plan = into[group] if into is not None else None
            plans.append(backend.plan(batch, inputs.key, group=group, into=plan, recorder=recorder))
        for group in range(len(plans), len(self._first_layer)):
            states, plan = self._states[self._first_layer[group]], into[group] if into is not None else None
            view = state_view(inputs, fields)
            plans.append(states.plan(view, inputs.key, group=group, into=plan, recorder=recorder))
        return plans

    @torch.inference_mode()
    def sample(self, state: TorchState, hidden: TorchHidden, late: SamplingInputs) -> tuple[TorchState, StepOutputs]:
        results = dict(zip(SCORE_NAMES, hidden.scores, strict=False))
        if hidden.logits is None or late.num_samples == 0:
            results["token_ids"] = torch.empty(0, dtype=torch.int32)
        else:
            results |= self._draw(state, hidden, hidden.logits[: late.num_samples], late)
        host = {name: value.to("cpu", non_blocking=True) for name, value in results.items()}
        return state, TorchOutputs(host, self.platform.event())

    def _draw(self, state: TorchState, hidden: TorchHidden, logits: Tensor, late: SamplingInputs) -> dict[str, Tensor]:
        count = late.num_samples
        views = hidden.draws
        if late.staged_at is None:
            views = arena_views(torch.from_numpy(late.arena).to(self.device, non_blocking=True), late.sections)
        drawn = draw_tokens(
            self.ops,
            logits.float(),
            {name: view[:count] for name, view in views.items()},
            slots=hidden.sample_slots[:count],
            last_ids=state.last_ids,
            edits=state.edits,
            features=late.key.features,
            max_drafts=self.limits.max_drafts,
            all_greedy=late.all_greedy,
        )
        state.last_ids.copy_(drawn.last_ids)  # graphs read this storage
        state.edits.counts = drawn.counts
        return drawn.outputs()

    # -- graphs -------------------------------------------------------------------------------------------

    def _blank(self, key: ShapeKey) -> tuple[StepInputs, Tensor, Mapping[str, Tensor]]:
        """A step of padding alone, on the host and on the device."""
        inputs = blank_step_inputs(
            key,
            num_groups=len(self.kv.block_sizes),
            slot_dtype=self.platform.capabilities.slot_dtype,
            max_slots=self.limits.max_slots,
            states=bool(self.kv.states),
        )
        staged = torch.from_numpy(inputs.staged).to(self.device).clone()
        return inputs, staged, arena_views(staged, inputs.sections)

    def _capture(self, key: ShapeKey) -> CapturedStep:
        inputs, staged, fields = self._blank(key)
        recorder = Recorder()
        plans = self._plans(inputs, fields, recorder=recorder)

        def step() -> Tensor | None:
            context = self._context(self._state, plans)
            hidden = self.model.forward(_known_ids(self._state, fields), fields["positions"], context)
            return self._logits(hidden, fields["logits_indices"])

        handle = self.graphs.capture(step, key, recorder=recorder, communicators=self.communicators)
        return CapturedStep(handle, staged, fields, _staged_draws(staged, inputs), plans)

    def _capture_pieces(self, num_tokens: int) -> CapturedPieces:
        pages = max(self.limits.max_pages, default=1)
        key = ShapeKey(num_tokens=num_tokens, num_reqs=1, num_samples=1, max_query_len=0, num_pages=pages)
        inputs, _, fields = self._blank(key)
        plans = self._plans(inputs, fields)
        ids, positions = _known_ids(self._state, fields).clone(), fields["positions"].clone()

        def step(run_outside_graph: RunOutsideGraph) -> Tensor:
            return self.model.forward(ids, positions, self._context(self._state, plans, run_outside_graph))

        handle = self.graphs.capture_pieces(step, plans, num_tokens, communicators=self.communicators)
        return CapturedPieces(handle, ids, positions)


def _known_ids(state: TorchState, fields: Mapping[str, Tensor]) -> Tensor:
    """Input ids, those that only the device knows among them."""
    ids = fields["input_ids"]
    return torch.where(ids < 0, state.last_ids[fields["token_slots"]], ids)


def _staged_draws(staged: Tensor, inputs: StepInputs) -> Mapping[str, Tensor]:
    layout = sampling_layout(inputs.key.num_samples, 0, drafts=inputs.has_drafts)
    return arena_views(staged[staged_size(inputs.sections, layout)[0] :], layout)
