"""What TorchStepProgram keeps between steps, between a step's two halves, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anychip.ops.reference import EditState, arena_views, blank_stacks
from anychip.plugin_api import (
    AdapterSite,
    AdapterStack,
    Event,
    ForwardExtras,
    HostOutputs,
    Platform,
    Scores,
    StepAdapters,
    StepInputs,
    StepLimits,
)
from anychip.plugin_api.step_layout import sampling_layout, staged_size
from anychip.worker.captured import CapturedStep

SCORE_NAMES = ("scores", "score_ids", "score_tops")
"""Of TorchHidden.scores, as they travel to the host."""


@dataclass(slots=True)
class TorchState:
    caches: list[object]  # by layer
    last_ids: Tensor  # [max_slots + 1] int32; the extra one takes what padded rows sample
    edits: EditState
    embeddings: Tensor | None  # [max_embeddings, hidden_size] float32; None where limits have none
    adapters: Sequence[AdapterStack] = ()  # by site; () where limits have no slots

    def extras(self, fields: Mapping[str, Tensor], limits: StepLimits) -> ForwardExtras | None:
        """Of a step with these arrays."""
        return ForwardExtras.of(fields, tap_layers=limits.taps, embeddings=self.embeddings)

    def step_adapters(self, fields: Mapping[str, Tensor]) -> StepAdapters | None:
        """Of a step with these arrays; None: no token has one."""
        slots = fields.get("adapter_slots")
        return None if slots is None else StepAdapters(slots, self.adapters)


@dataclass(slots=True)
class TorchHidden:
    logits: Tensor | None  # [num_samples, vocab_size]; None when no row samples
    sample_slots: Tensor  # [num_samples]
    draws: Mapping[str, Tensor]  # the arrays of SamplingInputs that were staged with the step
    scores: tuple[Tensor, ...] = ()  # by scored token: log-probability, the likeliest ids and theirs
    pooled: Tensor | None = None  # [num_reqs, hidden_size]
    taps: Sequence[Tensor] = ()
    step: CapturedStep | None = None
    """That gave it; None: it ran eagerly, or in pieces."""


def blank_embeddings(limits: StepLimits, hidden_size: int, device: str) -> Tensor | None:
    if not limits.max_embeddings:
        return None
    return torch.zeros(limits.max_embeddings, hidden_size, dtype=torch.float32, device=device)


def blank_adapters(sites: Sequence[AdapterSite], limits: StepLimits, platform: Platform) -> list[AdapterStack]:
    """Slots without adapters, by site."""
    return blank_stacks(
        sites,
        limits.max_adapters,
        limits.max_adapter_rank,
        lambda shape, dtype: platform.empty(shape, dtype, "adapters"),
    )


def known_ids(state: TorchState, fields: Mapping[str, Tensor]) -> Tensor:
    """Input ids, those that only the device knows among them."""
    ids = fields["input_ids"]
    return torch.where(ids < 0, state.last_ids[fields["token_slots"]], ids)


def staged_draws(staged: Tensor, inputs: StepInputs, has_drafts: bool) -> Mapping[str, Tensor]:
    """The arrays of SamplingInputs that are staged with a step of this layout."""
    layout = sampling_layout(inputs.key.num_samples, 0, drafts=has_drafts)
    return arena_views(staged[staged_size(inputs.sections, layout)[0] :], layout)


class TorchOutputs:
    """plugin_api.StepOutputs: host tensors that are being filled, and the event after which they are."""

    def __init__(self, host: dict[str, Tensor], event: Event) -> None:
        self._host = host
        self._event = event

    def fetch(self) -> HostOutputs:
        self._event.wait()
        arrays = {name: tensor.numpy() for name, tensor in self._host.items()}
        scores = None
        if SCORE_NAMES[0] in arrays:
            logprobs, top_ids, top = (arrays.pop(name) for name in SCORE_NAMES)
            scores = Scores(logprobs=logprobs, top_ids=top_ids, top_logprobs=top)
        return HostOutputs(**arrays, scores=scores)
