"""Drives one worker step by step, as the engine does, with block tables that the case chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anychip.plugin_api import NO_ADAPTER
from anychip.prompt_extras import PromptExtras
from anychip.step_messages import AdapterSlot, LateInputs, NewRow, StepDecision, StepResult
from anychip.worker.worker_result import WorkerResult
from anychip_conformance.device import Device
from anychip_conformance.engines import open_worker
from anychip_conformance.equality import VOCAB_SIZE

_TOP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RowEdits:
    """A row's penalties and biases; `num_output` of its tokens are output already."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    biases: dict[int, float] = field(default_factory=dict)
    num_output: int = 0


_NO_EDITS = RowEdits()


class StepDriver:
    """One KV group. Requests get the blocks they are told, and stay in their slot until `finish`."""

    def __init__(
        self, device: Device, folder: Path, *, max_drafts: int = 0, vocab_size: int = VOCAB_SIZE, **settings: Any
    ) -> None:
        if max_drafts:
            settings |= {"speculate": "ngram", "max_drafts": max_drafts}
        self.worker = open_worker(device, folder, **settings)
        self._device, self._rules = device, device.platform.step_rules
        self.block_size = self.worker.ready.kv.groups[0].block_size
        self._vocab_size = vocab_size
        self._step = 0

    def step(self, **given: Any) -> StepResult:
        """As begin, and waits for the result."""
        return self.begin(**given).fetch()

    def begin(
        self,
        *,
        new: dict[int, tuple[list[int], list[int]]] | None = None,
        tokens: dict[int, int],
        finished: list[int] | None = None,
        copies: list[tuple[int, int]] | None = None,
        zeros: list[int] | None = None,
        computed: dict[int, int] | None = None,
        masks: dict[int, set[int]] | None = None,
        edits: dict[int, RowEdits] | None = None,
        scored: set[int] | None = None,
        drafts: dict[int, list[int]] | None = None,
        rewinds: dict[int, int] | None = None,
        extras: dict[int, PromptExtras] | None = None,
        adapters: list[AdapterSlot] | None = None,
        adapter_slots: dict[int, int] | None = None,
    ) -> WorkerResult:
        """Starts a step, whose result is fetched later: at most one before the next is started.

        `new` by slot: token ids and blocks, whose first `computed` tokens are in the cache already. `tokens` by
        slot: how many this step computes, its `drafts` among them. `masks` by place among the samples: the token ids
        that may be drawn. `rewinds` by slot: how many of its tokens are computed after all.
        `edits`, `extras` and `adapter_slots` by slot, of new ones; `adapters` are what the device's slots of adapters
        get. `scored` slots, when they are new, report their prompt's log-probabilities."""
        broken = self._rules.broken_by(list(tokens.values()))
        self._device.limit(broken, not broken)
        self._step += 1
        rows = [
            self._row(
                slot,
                ids,
                blocks,
                computed=(computed or {}).get(slot, 0),
                edits=(edits or {}).get(slot, _NO_EDITS),
                scored=slot in (scored or ()),
                extras=(extras or {}).get(slot),
                adapter_slot=(adapter_slots or {}).get(slot, NO_ADAPTER),
            )
            for slot, (ids, blocks) in (new or {}).items()
        ]
        self.worker.launch(
            StepDecision(
                step_id=self._step,
                slots=np.asarray(list(tokens), dtype=np.int32).tobytes(),
                num_tokens=np.asarray(list(tokens.values()), dtype=np.int32).tobytes(),
                new_rows=rows,
                new_blocks=b"",
                finished_slots=finished or [],
                copies=copies or [],
                zeros=zeros or [],
                num_drafts=_packed([len((drafts or {}).get(slot, ())) for slot in tokens]) if drafts else b"",
                drafts=_packed([token for slot in tokens for token in (drafts or {}).get(slot, ())]),
                rewinds=_packed([number for pair in (rewinds or {}).items() for number in pair]),
                adapters=adapters or [],
            )
        )
        packed = {place: _bitmask(allowed, self._vocab_size) for place, allowed in (masks or {}).items()}
        return self.worker.sample(LateInputs(step_id=self._step, masks=packed))

    @staticmethod
    def _row(
        slot: int,
        ids: list[int],
        blocks: list[int],
        *,
        computed: int,
        edits: RowEdits,
        scored: bool,
        extras: PromptExtras | None,
        adapter_slot: int,
    ) -> NewRow:
        num_prompt = len(ids) - edits.num_output
        return NewRow(
            slot=slot,
            token_ids=np.asarray(ids, dtype=np.int32).tobytes(),
            num_prompt=num_prompt,
            num_computed=computed,
            block_ids=[blocks],
            seed=slot,
            logprobs=_TOP,
            score_from=0 if scored else num_prompt,
            score_top=_TOP,
            repetition_penalty=edits.repetition,
            presence_penalty=edits.presence,
            frequency_penalty=edits.frequency,
            logit_bias=edits.biases,
            extras=extras,
            adapter_slot=adapter_slot,
        )

    def close(self) -> None:
        self.worker.close("judged")


def tokens_of(result: StepResult) -> list[int]:
    return np.frombuffer(result.token_ids, dtype=np.int32).tolist()


def rows_of(result: StepResult) -> list[list[int]]:
    """The tokens that each sampling row gained."""
    ids, counts = tokens_of(result), np.frombuffer(result.num_gained, dtype=np.int32).tolist()
    return [[ids.pop(0) for _ in range(count)] for count in counts or [1] * len(ids)]


def _packed(numbers: list[int]) -> bytes:
    return np.asarray(numbers, dtype=np.int32).tobytes()


def _bitmask(allowed: set[int], vocab_size: int) -> bytes:
    words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.tobytes()
