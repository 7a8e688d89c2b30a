"""Captures a program's steps: over storage of their own, from a step of padding alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from anychip.ops.reference import arena_views
from anychip.plugin_api import (
    TAPS,
    Communicator,
    ForwardContext,
    ForwardExtras,
    GraphCapture,
    KVPlan,
    Platform,
    Recorder,
    RunOutsideGraph,
    ShapeKey,
    StepAdapters,
    StepInputs,
    StepLimits,
    StepModel,
    Unsupported,
)
from anychip.plugin_api.step_layout import blank_step_inputs, sampling_layout, staged_size
from anychip.worker.captured import CapturedPieces, CapturedStep
from anychip.worker.torch_caches import LayerCaches
from anychip.worker.torch_state import TorchState, known_ids, staged_draws


class CapturedProgram(Protocol):
    """What TorchStepProgram has of a step that is captured."""

    platform: Platform
    device: str
    model: StepModel
    kv: KVPlan
    limits: StepLimits
    graphs: GraphCapture
    communicators: Sequence[Communicator]
    caches: LayerCaches

    @property
    def state(self) -> TorchState: ...
    def context(
        self,
        state: TorchState,
        plans: Sequence[Any],
        run_outside_graph: RunOutsideGraph | None = None,
        extras: ForwardExtras | None = None,
        adapters: StepAdapters | None = None,
    ) -> ForwardContext: ...
    def mark_routed(self, context: ForwardContext, fields: Mapping[str, Tensor]) -> None: ...
    def logits(self, hidden: Tensor, rows: Tensor, adapters: StepAdapters | None = None) -> Tensor | None: ...


class StepCaptures:
    """`refused` says why the platform could not capture a step that its policy has a shape for; "": it could."""

    def __init__(self, program: CapturedProgram) -> None:
        self._program = program
        self.refused = ""

    def step(self, key: ShapeKey) -> CapturedStep | None:
        """A whole step; None where the platform cannot."""
        program = self._program
        inputs, staged, fields = self._blank(key)
        recorder = Recorder()
        plans, taps = program.caches.plans(inputs, fields, recorder=recorder), list[Tensor]()

        def step() -> Tensor | None:
            state = program.state
            extras = state.extras(fields, program.limits)
            adapters = state.step_adapters(fields)
            context = program.context(state, plans, extras=extras, adapters=adapters)
            program.mark_routed(context, fields)
            hidden = program.model.forward(known_ids(state, fields), fields["positions"], context)
            if extras is not None:
                taps[:] = extras.tapped()  # the run that counts is the last
            return program.logits(hidden, fields["logits_indices"], adapters)

        try:
            handle = program.graphs.capture(step, key, recorder=recorder, communicators=program.communicators)
        except Unsupported as error:
            self.refused = str(error)
            return None
        with_drafts = (False, True) if program.limits.max_drafts else (False,)
        draws = {drafts: staged_draws(staged, inputs, drafts) for drafts in with_drafts}
        return CapturedStep(handle, staged, fields, draws, plans, taps)

    def in_pieces(self, shape: tuple[int, bool]) -> CapturedPieces | None:
        """Of so many tokens, with taps or without; None where the platform cannot."""
        program = self._program
        num_tokens, tapped = shape
        pages = max(program.limits.max_pages, default=1)
        sizes = {"num_reqs": 1, "num_samples": 1, "max_query_len": 0, "num_pages": pages}
        key = ShapeKey(num_tokens=num_tokens, features=(TAPS,) if tapped else (), **sizes)
        inputs, _, fields = self._blank(key)
        plans = program.caches.plans(inputs, fields)
        ids, positions = known_ids(program.state, fields).clone(), fields["positions"].clone()
        taps = list[Tensor]()

        def step(run_outside_graph: RunOutsideGraph) -> Tensor:
            state = program.state
            extras = state.extras(fields, program.limits)
            context = program.context(state, plans, run_outside_graph, extras)
            hidden = program.model.forward(ids, positions, context)
            if extras is not None:
                taps[:] = extras.tapped()
            return hidden

        try:
            handle = program.graphs.capture_pieces(step, plans, num_tokens, communicators=program.communicators)
        except Unsupported as error:
            self.refused = str(error)
            return None
        return CapturedPieces(handle, ids, positions, fields.get("tap_tokens"), taps)

    def _blank(self, key: ShapeKey) -> tuple[StepInputs, Tensor, Mapping[str, Tensor]]:
        """A step of padding alone, on the host and on the device, there with room for drafts where steps have any."""
        program = self._program
        inputs = blank_step_inputs(
            key,
            num_groups=len(program.kv.block_sizes),
            slot_dtype=program.platform.capabilities.slot_dtype,
            max_slots=program.limits.max_slots,
            states=bool(program.kv.states),
        )
        draws = sampling_layout(key.num_samples, 0, drafts=bool(program.limits.max_drafts))
        staged = torch.zeros(staged_size(inputs.sections, draws)[1], dtype=torch.uint8, device=program.device)
        staged[: len(inputs.staged)].copy_(torch.from_numpy(inputs.staged))
        return inputs, staged, arena_views(staged, inputs.sections)
