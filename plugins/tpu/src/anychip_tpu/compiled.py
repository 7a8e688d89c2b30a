"""What is compiled for a model: its steps, its draws, and what changes the state between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anychip.ops.reference import EditState, Passed, draw_tokens, forward_pass
from anychip.plugin_api import (
    DRAFTS,
    EDITS,
    LOGPROBS,
    MASKS,
    KVPlan,
    Ops,
    Section,
    ShapeKey,
    StepLimits,
    StepModel,
)
from anychip.plugin_api.step_layout import blank_sampling_inputs, blank_step_inputs
from anychip_tpu.arrays import device_views, host_arrays
from anychip_tpu.attention import paged_plan
from anychip_tpu.edits import EDITS_AT_ONCE, edited
from anychip_tpu.runtimes import Program, Runtime

EMBEDDINGS_AT_ONCE = 64
"""Rows of the buffer of embeddings that one run of the program writes."""
FULL = (LOGPROBS, MASKS, EDITS)
"""What the one program that draws with features has: it serves any of them. Masks of ones mask nothing, and edits of a
slot without penalties change nothing."""


@dataclass(frozen=True, slots=True)
class State:
    """Donated from call to call."""

    caches: list[Tensor]  # by layer
    last_ids: Tensor  # [max_slots + 1] int32
    edits: list[Tensor]  # EditState's counts, bias ids and biases
    embeddings: list[Tensor]  # the buffer, with one row more for padding; [] without embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One way to draw. `greedy`: no sample has a temperature; `full`: some have features of FULL."""

    num_samples: int
    greedy: bool = False
    full: bool = False
    drafts: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        return (FULL if self.full else ()) + ((DRAFTS,) if self.drafts else ())

    @property
    def key(self) -> ShapeKey:
        count = self.num_samples
        return ShapeKey(
            num_tokens=count, num_reqs=count, num_samples=count, max_query_len=1, num_pages=1, features=self.features
        )


def draws(num_samples: int, with_drafts: bool) -> list[Draw]:
    """Every way that steps with so many samples may need."""
    found = [
        Draw(num_samples=num_samples, greedy=True),
        Draw(num_samples=num_samples),
        Draw(num_samples=num_samples, full=True),
    ]
    return found + ([Draw(num_samples=num_samples, full=True, drafts=True)] if with_drafts else [])


class Compiler:
    """Compiles what one model needs, over the tensors of a state that stands for all later ones."""

    def __init__(self, runtime: Runtime, model: StepModel, ops: Ops, kv: KVPlan, limits: StepLimits) -> None:
        self._runtime, self._model, self._ops, self._kv, self._limits = runtime, model, ops, kv, limits

    def uploaded(self, arena: np.ndarray, sections: Mapping[str, Section]) -> list[Tensor]:
        return [self._runtime.upload(array) for array in host_arrays(arena, sections)]

    # -- the forward pass ---------------------------------------------------------------------------------

    def forward(self, state: State, key: ShapeKey) -> Program:
        """(caches, last ids, embeddings, the step's arrays) to (caches, logits, scores, pooled sums, taps)."""
        blank = blank_step_inputs(
            key, num_groups=len(self._kv.block_sizes), slot_dtype="int32", max_slots=self._limits.max_slots
        )
        num_layers = len(state.caches)

        def step(*given: Tensor) -> list[Tensor]:
            last_ids, *rest = given[num_layers:]
            buffer = rest.pop(0) if state.embeddings else None
            passed = self.passed(given[:num_layers], last_ids, buffer, device_views(rest, blank.sections))
            pooled = [] if passed.pooled is None else [passed.pooled]
            return self._placed(passed.caches) + self._whole(
                [passed.logits.float(), *passed.scores, *pooled, *passed.taps]
            )

        example = [*state.caches, state.last_ids, *state.embeddings, *self.uploaded(blank.arena, blank.sections)]
        return self._runtime.compile(step, example, donated=range(num_layers))

    def passed(
        self, caches: Sequence[Tensor], last_ids: Tensor, buffer: Tensor | None, fields: Mapping[str, Tensor]
    ) -> Passed:
        plans = [
            paged_plan(
                fields["positions"],
                fields[f"slot_mapping_{group}"],
                fields["query_start"],
                fields["seq_lens"],
                fields[f"block_table_{group}"],
            )
            for group in range(len(self._kv.block_sizes))
        ]
        return forward_pass(
            self._model, self._ops, plans, self._kv.layer_groups, caches, last_ids, fields,
            tap_layers=self._limits.taps, embeddings=buffer,
        )  # fmt: skip

    def _placed(self, caches: Sequence[Tensor]) -> list[Tensor]:
        return [
            self._runtime.constrain(cache, backend.cache_placement())  # type: ignore[attr-defined]
            for cache, backend in zip(caches, self._model.attention, strict=True)
        ]

    def _whole(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._runtime.constrain(tensor, ()) for tensor in tensors]

    # -- draws --------------------------------------------------------------------------------------------

    def draw(self, state: State, draw: Draw) -> tuple[Program, list[str]]:
        """(last ids, edits, logits, slots, the sampling's arrays) to (last ids, counts where `full`, what was drawn),
        and the names of what was drawn, by field of HostOutputs."""
        blank, names = blank_sampling_inputs(draw.key, self._model.vocab_size), list[str]()

        def step(last_ids: Tensor, counts: Tensor, bias_ids: Tensor, biases: Tensor, *rest: Tensor) -> list[Tensor]:
            logits, slots, *arrays = rest
            drawn = draw_tokens(
                self._ops, logits, device_views(arrays, blank.sections), slots=slots, last_ids=last_ids,
                edits=EditState(counts, bias_ids, biases), features=draw.features,
                max_drafts=self._limits.max_drafts, all_greedy=draw.greedy,
            )  # fmt: skip
            found = drawn.outputs()
            names[:] = found
            return self._whole([drawn.last_ids, *([drawn.counts] if draw.full else []), *found.values()])

        logits = self._runtime.zeros((draw.num_samples, self._model.vocab_size), torch.float32)
        slots = self._runtime.upload(torch.zeros(draw.num_samples, dtype=torch.int32))
        arrays = self.uploaded(blank.arena, blank.sections)
        example = [state.last_ids, *state.edits, logits, slots, *arrays]
        return self._runtime.compile(step, example, donated=(0, 1) if draw.full else (0,)), names

    # -- between steps ------------------------------------------------------------------------------------

    def edit(self, state: State) -> Program:
        """(caches, [3, EDITS_AT_ONCE] of edits.turns) to caches."""

        def step(*given: Tensor) -> list[Tensor]:
            *caches, blocks = given
            return self._placed([edited(cache, *blocks.unbind()) for cache in caches])

        blocks = self._runtime.upload(torch.zeros(3, EDITS_AT_ONCE, dtype=torch.int32))
        return self._runtime.compile(step, [*state.caches, blocks], donated=range(len(state.caches)))

    def enter(self, state: State) -> Program:
        """(edits, a slot [1], its row of each) to edits."""

        def step(*given: Tensor) -> list[Tensor]:
            tables, slot, rows = given[:3], given[3].long(), given[4:]
            return self._whole([table.index_copy(0, slot, row) for table, row in zip(tables, rows, strict=True)])

        upload = self._runtime.upload
        rows = [upload(torch.zeros(1, *table.shape[1:], dtype=table.dtype)) for table in state.edits]
        slot = upload(torch.zeros(1, dtype=torch.int32))
        return self._runtime.compile(step, [*state.edits, slot, *rows], donated=range(3))

    def embed(self, state: State) -> Program:
        """(the buffer, rows [EMBEDDINGS_AT_ONCE], their values) to the buffer."""

        def step(buffer: Tensor, rows: Tensor, values: Tensor) -> list[Tensor]:
            return self._whole([buffer.index_copy(0, rows.long(), values)])

        buffer = state.embeddings[0]
        rows = self._runtime.upload(torch.zeros(EMBEDDINGS_AT_ONCE, dtype=torch.int32))
        values = self._runtime.upload(torch.zeros(EMBEDDINGS_AT_ONCE, buffer.shape[1]))
        return self._runtime.compile(step, [buffer, rows, values], donated=(0,))
