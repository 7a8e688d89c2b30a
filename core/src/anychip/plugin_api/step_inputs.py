"""What a step takes: its rows, tokens and samples as host arrays, and what draws tokens for the samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anychip.plugin_api.adapters import NO_ADAPTER
from anychip.plugin_api.graph import (
    ADAPTERS,
    DRAFTS,
    EMBEDDINGS,
    MASKS,
    MROPE,
    POOLED,
    SCORES,
    SEGMENTS,
    TAPS,
    ShapeKey,
)
from anychip.plugin_api.step_arrays import SLOT_DTYPE, Layout, array
from anychip.prompt_extras import NUM_AXES as NUM_AXES
from anychip.types import MAX_BIASES, NULL_BLOCK, PADDING_SLOT

STATES = "states"
"""Stands among the features that a step's arrays are laid out for, where the model has state layers. It is no feature
of a ShapeKey: all steps of such a model have it."""
IN_PROMPT, DRAWN = 1, 2
"""What a token's count holds: IN_PROMPT once where it stands in the prompt, and DRAWN for each time in the output."""


@dataclass(slots=True, kw_only=True)
class StepInputs:
    """Host arrays of one step, padded to `key`. All lie in one buffer, `arena`, so that one copy moves them.

    An input id of -1 means: the slot's last sampled token, which only the device knows yet.
    Padded tokens have id 0, position 0, row 0 and slot mapping PADDING_SLOT; padded rows have length 0 and slot
    `max_slots`, one past the real ones.
    """

    key: ShapeKey
    staged: np.ndarray  # uint8: the arena, and behind it the one of the step's SamplingInputs
    arena: np.ndarray  # uint8
    sections: Layout  # by array: the fields' names, block_table_<group>, slot_mapping_<group>
    input_ids: np.ndarray = array("num_tokens")
    positions: np.ndarray = array("num_tokens")
    token_slots: np.ndarray = array("num_tokens", padding="max_slots")  # the persistent slot of each token's request
    query_start: np.ndarray = array("num_reqs + 1")  # padded with num_tokens
    seq_lens: np.ndarray = array("num_reqs")
    logits_indices: np.ndarray = array("num_samples")  # token whose hidden state is sampled from
    sample_slots: np.ndarray = array("num_samples", padding="max_slots")  # slot of each sample's row
    block_tables: tuple[np.ndarray, ...] = array(
        "num_reqs", "num_pages", padding=NULL_BLOCK, name="block_table", by_group=True
    )
    slot_mappings: tuple[np.ndarray, ...] = array(
        "num_tokens", dtype=SLOT_DTYPE, padding=PADDING_SLOT, name="slot_mapping", by_group=True
    )
    state_blocks: np.ndarray | None = array("num_reqs", padding=NULL_BLOCK, feature=STATES)
    """Each row's block in the states' pool; None for a model without state layers."""
    score_targets: np.ndarray | None = array("num_tokens", padding=-1, feature=SCORES)
    """The id to score after a token; -1: none."""
    tap_tokens: np.ndarray | None = array("num_tokens", feature=TAPS)
    """The tokens whose hidden states are wanted behind each layer of StepLimits.taps, num_tapped of them."""
    pool_rows: np.ndarray | None = array("num_tokens", padding="num_reqs", feature=POOLED)
    """The row to whose sum a token's final hidden state is added; key.num_reqs: to none."""
    embedding_rows: np.ndarray | None = array("num_tokens", padding=-1, feature=EMBEDDINGS)
    """The row of the buffer of embeddings that the first layer reads at a token; -1: the token's own embedding."""
    rope_positions: np.ndarray | None = array("num_axes", "num_tokens", feature=MROPE)
    """By axis, what the rotary embedding turns by in place of `positions`, which stay the tokens' places in their
    sequences."""
    segments: np.ndarray | None = array("num_tokens", feature=SEGMENTS)
    """Which text of its row's pair a token belongs to: 0 or 1."""
    adapter_slots: np.ndarray | None = array("num_tokens", padding=NO_ADAPTER, feature=ADAPTERS)
    """The slot of the adapter that a token has; NO_ADAPTER: none."""
    num_rows: int  # unpadded
    num_tokens: int
    num_samples: int
    max_query_len: int
    num_tapped: int = 0
    has_drafts: bool
    """Whether the SamplingInputs that are staged with the step hold drafts."""


@dataclass(slots=True, kw_only=True)
class SamplingInputs:
    """By sample, padded to key.num_samples: what drawing a token needs. Lies in one buffer, `arena`. The samples of a
    row stand together, in the order of their positions.

    With the feature EDITS some samples have penalties or biases. Ops.edit_logits takes them, and the counts and biases
    that the state keeps by slot. It comes before the masks.
    Every token drawn in such a step that counts for its row is counted (Ops.count_tokens).
    With the feature DRAFTS some rows have several samples, and input tokens that are guesses. A sample is kept where
    every earlier sample of its row drew the token that was drafted behind it (Ops.accept_drafts); what the others drew
    counts for nothing. Edits at a sample see the tokens drafted before it as drawn.
    `masks` is a packed bitmask of allowed tokens, bit i of word i // 32 for token i; None when no row has one.
    `staged_at` is where the arena begins in StepInputs.staged, so that a device which copied that has it already; None
    when masks came late and it is a buffer of its own.
    """

    key: ShapeKey
    arena: np.ndarray  # uint8
    sections: Layout
    temperature: np.ndarray = array("num_samples", dtype="float32")  # 0 is greedy
    top_p: np.ndarray = array("num_samples", dtype="float32", padding=1)
    min_p: np.ndarray = array("num_samples", dtype="float32")
    repetition_penalty: np.ndarray = array("num_samples", dtype="float32", padding=1)  # 1: none
    presence_penalty: np.ndarray = array("num_samples", dtype="float32")
    frequency_penalty: np.ndarray = array("num_samples", dtype="float32")
    num_biases: np.ndarray = array("num_samples")  # how many of its slot's biases are the sample's
    top_k: np.ndarray = array("num_samples")  # 0: all
    seed_low: np.ndarray = array("num_samples")  # the low 32 bits of the seed
    seed_high: np.ndarray = array("num_samples")
    sample_index: np.ndarray = array("num_samples")  # which of a request's n sequences
    position: np.ndarray = array("num_samples")  # of the token to be drawn
    draft_ids: np.ndarray | None = array("num_samples", padding=-1, feature=DRAFTS)
    """The token drafted behind the sample, which is an input of the step; -1: none."""
    first_samples: np.ndarray | None = array("num_samples", feature=DRAFTS)
    """The index of the first sample of the same row."""
    masks: np.ndarray | None = array("num_samples", "mask_words", padding=-1, feature=MASKS)
    num_samples: int
    all_greedy: bool
    staged_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRows:
    """Rows of the buffer of embeddings [max_embeddings, hidden_size] and what they hold from now on:
    StepProgram.embed takes them."""

    rows: np.ndarray  # [num_rows] int32, each once
    values: np.ndarray  # [num_rows, hidden_size] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class EnteringRow:
    """What a slot's logits are edited by from now on, in place of what the slot held: StepProgram.enter takes it.

    The program counts on by itself from there: each token that it draws for the slot in a step with EDITS.
    """

    slot: int
    token_ids: np.ndarray  # [num_tokens] int32, each once: those of the prompt and of the output so far
    counts: np.ndarray  # [num_tokens] int32: IN_PROMPT for a token of the prompt, and DRAWN for each time in the output
    bias_ids: np.ndarray  # [num_biases] int32, each once; MAX_BIASES at most
    biases: np.ndarray  # [num_biases] float32

    def row_of_counts(self, vocab_size: int) -> np.ndarray:
        """The slot's row of the counts, [vocab_size] int32."""
        row = np.zeros(vocab_size, dtype=np.int32)
        row[self.token_ids] = self.counts
        return row


def edit_state_bytes(max_slots: int, vocab_size: int) -> int:
    """Bytes of a program's state that penalties and biases take."""
    return (max_slots + 1) * 4 * (vocab_size + 2 * MAX_BIASES)
