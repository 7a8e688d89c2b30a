"""Penalties and biases as the device keeps them, against their plain definition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.ops.reference import EditState
from anychip.ops.reference.sampling import count_tokens, edit_logits
from anychip.plugin_api import EnteringRow
from anychip.worker.token_counter import TokenCounter

VOCAB_SIZE, MAX_SLOTS = 41, 3
tokens = st.integers(0, VOCAB_SIZE - 1)


@st.composite
def rows(draw):
    """By slot: prompt, output, how much of the output the row enters with, and what edits its logits."""
    output = draw(st.lists(tokens, max_size=20))
    return {
        "prompt": draw(st.lists(tokens, min_size=1, max_size=12)),
        "output": output,
        "entered": draw(st.integers(0, len(output))),
        "repetition": draw(st.sampled_from([1.0, 0.8, 1.3])),
        "presence": draw(st.sampled_from([0.0, 0.5, -2.0])),
        "frequency": draw(st.sampled_from([0.0, 0.25, -1.0])),
        "bias": draw(st.dictionaries(tokens, st.sampled_from([-100.0, 0.5, 7.0]), max_size=5)),
    }


def penalized(logits: np.ndarray, row: dict) -> np.ndarray:
    """The reference: penalties as their users know them."""
    out, counts = logits.astype(np.float64).copy(), Counter(row["output"])
    for token in set(row["prompt"]) | set(row["output"]):
        factor = row["repetition"]
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token, count in counts.items():
        out[token] -= row["frequency"] * count + row["presence"]
    for token, bias in row["bias"].items():
        out[token] += bias
    return out


def enter(state: EditState, slot: int, row: dict) -> None:
    ids = np.array(row["prompt"] + row["output"][: row["entered"]], dtype=np.int32)
    token_ids, counts = TokenCounter(VOCAB_SIZE).count(ids, len(row["prompt"]))
    state.enter(
        [
            EnteringRow(
                slot=slot,
                token_ids=token_ids,
                counts=counts,
                bias_ids=np.array(list(row["bias"]), dtype=np.int32),
                biases=np.array(list(row["bias"].values()), dtype=np.float32),
            )
        ]
    )


def edited(state: EditState, slots: list[int], of: list[dict], logits: np.ndarray) -> np.ndarray:
    def column(name: str) -> torch.Tensor:
        return torch.tensor([row[name] for row in of], dtype=torch.float32)

    return edit_logits(
        logits=torch.from_numpy(logits),
        slots=torch.tensor(slots, dtype=torch.int32),
        counts=state.counts,
        repetition_penalty=column("repetition"),
        presence_penalty=column("presence"),
        frequency_penalty=column("frequency"),
        bias_ids=state.bias_ids,
        biases=state.biases,
        num_biases=torch.tensor([len(row["bias"]) for row in of], dtype=torch.int32),
    ).numpy()


@settings(max_examples=100, deadline=None)
@given(
    before=st.lists(rows(), min_size=MAX_SLOTS, max_size=MAX_SLOTS),
    now=st.lists(rows(), min_size=1, max_size=MAX_SLOTS),
)
def test_logits_are_edited_by_the_penalties_of_the_row_that_holds_the_slot(before, now):
    """Whoever held the slot before, and however much of the output was drawn before the row entered: a request that was
    preempted enters with what it has."""
    state = EditState.blank(MAX_SLOTS, VOCAB_SIZE)
    slots = list(range(len(now)))
    for held in (before, now):
        for slot, row in enumerate(held):
            enter(state, slot, row)
        longest = max(len(row["output"]) - row["entered"] for row in held)
        for at in range(longest):
            drawn = [
                (slot, row["output"][row["entered"] + at])
                for slot, row in enumerate(held)
                if row["entered"] + at < len(row["output"])
            ]
            which, ids = (torch.tensor(column, dtype=torch.int32) for column in zip(*drawn, strict=True))
            state.counts = count_tokens(counts=state.counts, slots=which, ids=ids)
    logits = np.random.default_rng(0).normal(size=(len(now), VOCAB_SIZE)).astype(np.float32)
    expected = np.stack([penalized(line, row) for line, row in zip(logits, now, strict=True)])
    np.testing.assert_allclose(edited(state, slots, now, logits), expected, atol=1e-4)
