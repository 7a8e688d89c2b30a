"""What a step program says of a text: the log-probabilities of its tokens and of the likeliest others, once from whole
prompts, and once token by token. The seam shows no logits and no layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anychip.model_config import load_model_config
from anychip.plugin_api import MAX_LOGPROBS, StepRules
from anychip.plugin_api.step_layout import mask_words
from anychip.step_messages import LateInputs, NewRow, StepDecision, StepResult, TokenLogprobs
from anychip.types import cdiv
from anychip.worker.worker import Worker
from anychip_conformance.device import Device
from anychip_conformance.engines import open_worker

WHOLE, SINGLE = "whole", "single"
"""How the tokens were computed: as a prompt, in steps as long as the device takes; or each in a step of its own."""
_BLOCKS = 64
"""Of the KV cache, and more for longer texts."""


def record_program(device: Device, model: str, dtype: str, tokens: list[int]) -> dict[str, Tensor]:
    """By name: whole.ids and whole.logprobs [num_tokens - 1, 1 + MAX_LOGPROBS], of the token that follows each and of
    the likeliest; single.ids and single.logprobs of the text's second half."""
    blocks = max(_BLOCKS, 4 * len(tokens))
    settings = {"dtype": dtype, "max_model_len": len(tokens) + 1, "num_kv_blocks": blocks, "max_num_seqs": 2}
    worker = open_worker(device, Path(model), **settings)
    try:
        words = mask_words(load_model_config(model).vocab_size)
        return Text(worker, device.platform.step_rules, tokens, words).scores()
    finally:
        worker.close("recorded")


class Text:
    """One text on one worker: slot 0 has it as a prompt, slot 1 reads its half and is made to draw the rest."""

    def __init__(self, worker: Worker, rules: StepRules, tokens: list[int], num_words: int) -> None:
        self._worker, self._rules, self._tokens, self._num_words = worker, rules, tokens, num_words
        self._steps = 0
        self._next_block = 1

    def scores(self) -> dict[str, Tensor]:
        whole = [entry for result in self._prompt(0, len(self._tokens), None) for entry in result.prompt_logprobs[0]]
        half = max(1, len(self._tokens) // 2)
        *_, last = self._prompt(1, half, self._tokens[half])
        single = [last.logprobs[0]]
        for token in self._tokens[half + 1 :]:
            single.append(self._step(1, 1, None, token).logprobs[0])
        return {**_named(WHOLE, whole, self._tokens[1:]), **_named(SINGLE, single, self._tokens[half:])}

    def _prompt(self, slot: int, length: int, then: int | None) -> Iterator[StepResult]:
        """The text's first tokens in chunks. None: whatever follows; a token: made to be drawn after the last."""
        done = 0
        while done < length:
            chunk = _chunk(self._rules, length - done)
            row = None if done else self._row(slot, length, scored=then is None)
            done += chunk
            yield self._step(slot, chunk, row, then if done == length else None)

    def _row(self, slot: int, length: int, *, scored: bool) -> NewRow:
        tables = []
        for group in self._worker.ready.kv.groups:
            count = cdiv(len(self._tokens) + 1, group.block_size)
            tables.append(list(range(self._next_block, self._next_block + count)))
            self._next_block += count
        return NewRow(
            slot=slot,
            token_ids=np.asarray(self._tokens[:length], dtype=np.int32).tobytes(),
            num_prompt=length,
            num_computed=0,
            block_ids=tables,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=0,
            sample_index=0,
            logprobs=MAX_LOGPROBS,
            score_from=0 if scored else length,
            score_top=MAX_LOGPROBS,
        )

    def _step(self, slot: int, count: int, row: NewRow | None, drawn: int | None) -> StepResult:
        self._steps += 1
        self._worker.launch(
            StepDecision(
                step_id=self._steps,
                slots=np.asarray([slot], dtype=np.int32).tobytes(),
                num_tokens=np.asarray([count], dtype=np.int32).tobytes(),
                new_rows=[] if row is None else [row],
                new_blocks=b"",
                finished_slots=[],
                copies=[],
                zeros=[],
            )
        )
        masks = {} if drawn is None else {0: self._only(drawn)}
        return self._worker.sample(LateInputs(step_id=self._steps, masks=masks)).fetch()

    def _only(self, token: int) -> bytes:
        words = np.zeros(self._num_words, dtype=np.uint32)
        words[token // 32] = np.uint32(1 << token % 32)
        return words.tobytes()


def _chunk(rules: StepRules, left: int) -> int:
    """Tokens of one row's next step."""
    bounds = (left, rules.max_tokens, rules.max_padded_tokens)
    count = min(bound for bound in bounds if bound is not None)
    return count if count == left else count - count % rules.chunk_multiple


def _named(name: str, entries: list[TokenLogprobs], chosen: list[int]) -> dict[str, Tensor]:
    ids = [[token, *entry.top_ids] for token, entry in zip(chosen, entries, strict=True)]
    logprobs = [[entry.chosen, *entry.top] for entry in entries]
    return {f"{name}.ids": torch.tensor(ids), f"{name}.logprobs": torch.tensor(logprobs, dtype=torch.float64)}
