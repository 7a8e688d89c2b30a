"""The torch seam as a StepProgram: core runs the model, the platform's kernels do the work, graphs where it has any."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from anychip.layers.moe import travelling_layers
from anychip.layers.stage import WHOLE
from anychip.ops.reference import (
    Drawn,
    EditState,
    arena_views,
    draw_tokens,
    logits_of,
    pooled_sums,
    write_adapters,
    write_embeddings,
)
from anychip.plugin_api import (
    MAX_LOGPROBS,
    AdapterEntry,
    AdapterSite,
    Communicator,
    CompileReport,
    EmbeddingRows,
    EnteringRow,
    ForwardContext,
    ForwardExtras,
    GraphLevel,
    KVPlan,
    Ops,
    Platform,
    RunOutsideGraph,
    SamplingInputs,
    ShapeKey,
    StepAdapters,
    StepInputs,
    StepLimits,
    StepModel,
    StepOutputs,
    StepProgram,
    sites_of,
)
from anychip.worker.captured import Captured
from anychip.worker.captured_draws import CapturedDraws
from anychip.worker.returning_ids import ReturningIds
from anychip.worker.step_captures import StepCaptures
from anychip.worker.torch_caches import LayerCaches
from anychip.worker.torch_state import (
    SCORE_NAMES,
    TorchHidden,
    TorchOutputs,
    TorchState,
    blank_adapters,
    blank_embeddings,
    known_ids,
    staged_draws,
)

_SCORED_AT_ONCE = 128
"""Prompt tokens whose logits exist at once."""


class TorchStepProgram(StepProgram):
    """`communicators` are those that the model's layers use: a capture must know them. `pieces` are the numbers of
    tokens of steps that are captured in pieces. Without `edits` no step has penalties or biases, and no state is kept
    for them. `embeddings` None: the buffer is its own. `returning` None: all of the model's layers are here."""

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
        edits: bool = True,
        embeddings: Tensor | None = None,
        returning: ReturningIds | None = None,
    ) -> None:
        self.platform = platform
        self.model = model
        self.ops = ops
        self.kv = kv
        self.limits = limits
        self.communicators = communicators
        self.pieces = pieces
        self.stage = WHOLE if returning is None else returning.stage
        self._returning = returning
        self.device = platform.default_device
        self.graphs = platform.graph_capture()
        self._captures = StepCaptures(self)
        self._steps = Captured(self._captures.step)
        self._pieces = Captured(self._captures.in_pieces)
        self._draws = CapturedDraws(
            self.graphs, lambda state, hidden, late: self._drawn(state, hidden, late, late.key.num_samples)
        )
        # Taken before anything is measured: what is left for the KV cache is without it.
        self._edits = EditState.blank(limits.max_slots, model.vocab_size if edits else 0, self.device)
        if embeddings is None:
            embeddings = blank_embeddings(limits, model.hidden_size, self.device)
        self.embeddings = embeddings
        self._sites = sites_of(model) if limits.max_adapters else ()
        self._adapters = blank_adapters(self._sites, limits, platform)
        self.caches = LayerCaches(platform, model.attention, kv)
        self.travelling = travelling_layers(model)

    # -- preparation --------------------------------------------------------------------------------------

    def initial_state(self, num_blocks: int, num_states: int = 0) -> TorchState:
        last_ids = torch.zeros(self.limits.max_slots + 1, dtype=torch.int32, device=self.device)
        caches = self.caches.make(num_blocks, num_states)
        self.state = TorchState(caches, last_ids, self._edits, self.embeddings, self._adapters)
        return self.state

    @torch.inference_mode()
    def warm_up(self, keys: Sequence[ShapeKey]) -> CompileReport:
        """Captures a graph for each key, and pieces for each number of tokens that has them, largest first so that
        later ones fit in its memory; of those that may wait, the smallest, which shows at the start that capturing
        works."""
        start = time.perf_counter()
        keys = sorted(keys, key=lambda k: -k.num_tokens) if self.graphs.level >= GraphLevel.FULL else ()
        counts = sorted(self.pieces, reverse=True) if self.graphs.level >= GraphLevel.PIECEWISE else ()
        pieces = [(count, tapped) for count in counts for tapped in ((False, True) if self.limits.taps else (False,))]
        if self.graphs.lazy:
            self._steps.later(keys[:-1])
            self._pieces.later(pieces[:-1])
            keys, pieces = keys[-1:], pieces[-1:]
        self._steps.now(keys)
        self._pieces.now(pieces)
        num_programs = len(self._steps) + len(self._pieces)
        return CompileReport(
            num_programs=num_programs, seconds=time.perf_counter() - start, refused=self._captures.refused
        )

    @torch.inference_mode()
    def edit(self, state: TorchState, copies: Sequence[tuple[int, int]], zeros: Sequence[int]) -> TorchState:
        self.caches.edit(state.caches, copies, zeros)
        return state

    @torch.inference_mode()
    def copy_states(self, state: TorchState, copies: Sequence[tuple[int, int]]) -> TorchState:
        self.caches.copy_states(state.caches, copies)
        return state

    @torch.inference_mode()
    def enter(self, state: TorchState, rows: Sequence[EnteringRow]) -> TorchState:
        if self.stage.is_last:
            state.edits.enter(rows)
        return state

    @torch.inference_mode()
    def embed(self, state: TorchState, rows: Sequence[EmbeddingRows]) -> TorchState:
        assert state.embeddings is not None, "StepLimits.max_embeddings is 0"
        write_embeddings(state.embeddings, rows)
        return state

    @property
    def adapter_sites(self) -> Sequence[AdapterSite]:
        return self._sites

    @torch.inference_mode()
    def adapt(self, state: TorchState, entries: Sequence[AdapterEntry]) -> TorchState:
        write_adapters(state.adapters, self._sites, entries)
        return state

    # -- a step -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def await_ids(self, state: TorchState, ids_behind: int) -> None:
        """Before a step: takes in what the last stage has drawn, where this is the first of several."""
        if self._returning is not None and self.stage.is_first:
            self._returning.take_in(state.last_ids, ids_behind)

    @torch.inference_mode()
    def join(self) -> None:
        """A step without requests: other ranks' tokens travel to the experts here, and this rank has none to send."""
        for layer in self.travelling:
            layer.join()

    @torch.inference_mode()
    def forward(self, state: TorchState, inputs: StepInputs) -> tuple[TorchState, TorchHidden]:
        captured = self._steps.get(inputs.key)
        if captured is not None:
            captured.staged[: len(inputs.staged)].copy_(torch.from_numpy(inputs.staged), non_blocking=True)
            plans = self.caches.plans(inputs, captured.fields, into=captured.plans)
            logits = self.graphs.run(captured.handle, plans)
            slots, draws = captured.fields["sample_slots"], captured.draws[inputs.has_drafts]
            return state, TorchHidden(logits, slots, draws, taps=captured.taps, step=captured)
        staged = torch.from_numpy(inputs.staged).to(self.device, non_blocking=True)
        fields = arena_views(staged, inputs.sections)
        plans = self.caches.plans(inputs, fields)
        rows = fields["logits_indices"][: inputs.num_samples]
        ids, extras = known_ids(state, fields), state.extras(fields, self.limits)
        adapters = state.step_adapters(fields)
        hidden, taps = (None, ()) if adapters is not None else self._in_pieces(ids, fields, plans, extras)
        if hidden is None:
            context = self.context(state, plans, extras=extras, adapters=adapters)
            self.mark_routed(context, fields)
            hidden = self.model.forward(ids, fields["positions"], context)
            taps = () if extras is None else extras.tapped()
        targets = inputs.score_targets if self.stage.is_last else None
        scores, pooled = () if targets is None else self._scores(hidden, targets, adapters), None
        if inputs.pool_rows is not None and self.stage.is_last:
            pooled = pooled_sums(hidden, fields["pool_rows"], inputs.key.num_reqs)
        slots, draws = fields["sample_slots"][: inputs.num_samples], staged_draws(staged, inputs, inputs.has_drafts)
        return state, TorchHidden(self.logits(hidden, rows, adapters), slots, draws, scores, pooled, taps)

    def taps(self, hidden: TorchHidden) -> Sequence[Tensor]:
        return hidden.taps

    def context(
        self,
        state: TorchState,
        plans: Sequence[object],
        run_outside_graph: RunOutsideGraph | None = None,
        extras: ForwardExtras | None = None,
        adapters: StepAdapters | None = None,
    ) -> ForwardContext:
        return ForwardContext(plans, state.caches, self.kv.layer_groups, run_outside_graph, extras, adapters)

    def _in_pieces(
        self, ids: Tensor, fields: Mapping[str, Tensor], plans: Sequence[object], extras: ForwardExtras | None
    ) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Hidden states and taps; None where no pieces are captured for such a step."""
        pieces = None
        if extras is None or (extras.embedding_rows is None and extras.rope_positions is None):
            pieces = self._pieces.get((len(ids), extras is not None))
        if pieces is None:
            return None, ()
        pieces.ids.copy_(ids)
        pieces.positions.copy_(fields["positions"])
        if pieces.tap_tokens is not None:
            pieces.tap_tokens.copy_(fields["tap_tokens"])
        return self.graphs.run_pieces(pieces.handle, plans), pieces.taps

    def mark_routed(self, context: ForwardContext, fields: Mapping[str, Tensor]) -> None:
        """Where tokens travel to experts, padded ones stay, and do not count as load."""
        if self.travelling:
            context.routed = fields["token_slots"] < self.limits.max_slots

    def logits(self, hidden: Tensor, rows: Tensor, adapters: StepAdapters | None = None) -> Tensor | None:
        return logits_of(self.model, hidden, adapters, rows) if len(rows) and self.stage.is_last else None

    def _scores(self, hidden: Tensor, targets: np.ndarray, adapters: StepAdapters | None) -> tuple[Tensor, ...]:
        """In parts, so that the logits of a whole chunk of prompt never exist at once."""
        scored = np.flatnonzero(targets >= 0)
        parts = []
        for start in range(0, len(scored), _SCORED_AT_ONCE):
            tokens = scored[start : start + _SCORED_AT_ONCE]
            wanted = torch.from_numpy(targets[tokens]).to(self.device)
            logits = logits_of(self.model, hidden, adapters, torch.from_numpy(tokens).to(self.device)).float()
            parts.append(self.ops.logprobs(logits=logits, token_ids=wanted, num_top=MAX_LOGPROBS))
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    @torch.inference_mode()
    def sample(self, state: TorchState, hidden: TorchHidden, late: SamplingInputs) -> tuple[TorchState, StepOutputs]:
        results = dict(zip(SCORE_NAMES, hidden.scores, strict=False))
        if hidden.pooled is not None:
            results["pooled"] = hidden.pooled
        if hidden.logits is None or late.num_samples == 0:
            results["token_ids"] = torch.empty(0, dtype=torch.int32)
            if self._returning is not None and self.stage.is_first:
                self._returning.expect(hidden.sample_slots[: late.num_samples])
        else:
            results |= self._draw(state, hidden, late)
        host = {name: value.to("cpu", non_blocking=True) for name, value in results.items()}
        return state, TorchOutputs(host, self.platform.event())

    def _draw(self, state: TorchState, hidden: TorchHidden, late: SamplingInputs) -> dict[str, Tensor]:
        if (captured := self._draws(state, hidden, late)) is not None:
            return captured
        drawn = self._drawn(state, hidden, late, late.num_samples)
        state.last_ids.copy_(drawn.last_ids)  # graphs read this storage
        state.edits.counts = drawn.counts
        if self._returning is not None:
            self._returning.give(drawn.ids)
        return drawn.outputs()

    def _drawn(self, state: TorchState, hidden: TorchHidden, late: SamplingInputs, count: int) -> Drawn:
        """Of the first `count` samples."""
        logits, slots, views = hidden.logits, hidden.sample_slots, hidden.draws
        assert logits is not None
        if late.staged_at is None:
            views = arena_views(torch.from_numpy(late.arena).to(self.device, non_blocking=True), late.sections)
        if count < late.key.num_samples:  # where a bucket is full, the host saves a slice of every array
            logits, slots, views = logits[:count], slots[:count], {name: view[:count] for name, view in views.items()}
        return draw_tokens(
            self.ops,
            logits.float(),
            views,
            slots=slots,
            last_ids=state.last_ids,
            edits=state.edits,
            features=late.key.features,
            max_drafts=self.limits.max_drafts,
            all_greedy=late.all_greedy,
        )
