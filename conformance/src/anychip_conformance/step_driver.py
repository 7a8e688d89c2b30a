"""Drives one worker step by step, as the engine does, with block tables that the case chooses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anychip.messages import LateInputs, LogitEdits, NewRow, StepDecision, StepResult
from anychip_conformance.device import Device
from anychip_conformance.engines import open_worker
from anychip_conformance.equality import VOCAB_SIZE

_TOP = 20


class StepDriver:
    """One KV group. Requests get the blocks they are told, and stay in their slot until `finish`."""

    def __init__(self, device: Device, folder: Path) -> None:
        self.worker = open_worker(device, folder)
        self._device, self._rules = device, device.platform.step_rules
        self.block_size = self.worker.ready.kv.groups[0].block_size
        self._step = 0

    def step(
        self,
        *,
        new: dict[int, tuple[list[int], list[int]]] | None = None,
        tokens: dict[int, int],
        finished: list[int] | None = None,
        copies: list[tuple[int, int]] | None = None,
        zeros: list[int] | None = None,
        computed: dict[int, int] | None = None,
        masks: dict[int, set[int]] | None = None,
        edits: dict[int, dict[int, tuple[float, float]]] | None = None,
        scored: set[int] | None = None,
    ) -> StepResult:
        """`new` by slot: token ids and blocks, whose first `computed` tokens are in the cache already. `tokens` by
        slot: how many this step computes. `masks` by place among the sampling rows: the token ids that may be drawn.
        `edits` likewise: token id to the scale and the shift of its logit. `scored` slots, when they are new, report
        their prompt's log-probabilities."""
        broken = self._rules.broken_by(list(tokens.values()))
        self._device.limit(broken, not broken)
        self._step += 1
        rows = [
            NewRow(
                slot=slot,
                token_ids=np.asarray(ids, dtype=np.int32).tobytes(),
                num_prompt=len(ids),
                num_computed=(computed or {}).get(slot, 0),
                block_ids=[blocks],
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                seed=slot,
                sample_index=0,
                logprobs=_TOP,
                score_from=0 if slot in (scored or ()) else len(ids),
                score_top=_TOP,
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
            )
        )
        packed = {place: _bitmask(allowed) for place, allowed in (masks or {}).items()}
        changed = {place: _logit_edits(row) for place, row in (edits or {}).items()}
        return self.worker.sample(LateInputs(step_id=self._step, masks=packed, edits=changed)).fetch()

    def close(self) -> None:
        self.worker.close("judged")


def tokens_of(result: StepResult) -> list[int]:
    return np.frombuffer(result.token_ids, dtype=np.int32).tolist()


def _bitmask(allowed: set[int]) -> bytes:
    words = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.tobytes()


def _logit_edits(row: dict[int, tuple[float, float]]) -> LogitEdits:
    scales, shifts = (np.asarray(column, dtype=np.float32) for column in zip(*row.values(), strict=True))
    return LogitEdits(np.asarray(list(row), dtype=np.int32).tobytes(), scales.tobytes(), shifts.tobytes())
