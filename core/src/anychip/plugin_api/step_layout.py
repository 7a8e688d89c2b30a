"""Where a step's arrays lie in their arena, what a KV group sees of them, and blank inputs of a shape, for capturing
and compiling ahead."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from anychip.plugin_api.attention import BatchView
from anychip.plugin_api.graph import SCORES, ShapeKey, edits_width
from anychip.plugin_api.step import SamplingInputs, Section, StepInputs
from anychip.types import NULL_BLOCK, PADDING_SLOT

if TYPE_CHECKING:
    from torch import Tensor

SAMPLING_FLOATS = ("temperature", "top_p", "min_p")
SAMPLING_INTS = ("top_k", "seed_low", "seed_high", "sample_index", "position")
_ALIGN = 64
_REMEMBERED = 1024
"""Layouts kept: a device without buckets has a shape of its own for nearly every step."""

Layout = Mapping[str, Section]
_Fields = tuple[tuple[str, tuple[int, ...], str], ...]


@lru_cache(_REMEMBERED)
def step_layout(key: ShapeKey, num_groups: int, slot_dtype: str) -> Layout:
    """The arrays of StepInputs, by name."""
    tokens, rows = (key.num_tokens,), (key.num_reqs,)
    fields: _Fields = (
        ("input_ids", tokens, "int32"),
        ("positions", tokens, "int32"),
        ("token_slots", tokens, "int32"),
        ("query_start", (key.num_reqs + 1,), "int32"),
        ("seq_lens", rows, "int32"),
        ("logits_indices", rows, "int32"),
        ("sample_slots", rows, "int32"),
    )
    for group in range(num_groups):
        fields += ((f"block_table_{group}", (key.num_reqs, key.num_pages), "int32"),)
        fields += ((f"slot_mapping_{group}", tokens, slot_dtype),)
    if SCORES in key.features:
        fields += (("score_targets", tokens, "int32"),)
    return _place(fields)


@lru_cache(_REMEMBERED)
def sampling_layout(num_rows: int, mask_words: int, num_edits: int = 0) -> Layout:
    """The arrays of SamplingInputs, by name; mask_words 0: no masks; num_edits 0: no edits."""
    fields: _Fields = tuple((name, (num_rows,), "float32") for name in SAMPLING_FLOATS)
    fields += tuple((name, (num_rows,), "int32") for name in SAMPLING_INTS)
    if mask_words:
        fields += (("masks", (num_rows, mask_words), "int32"),)
    if num_edits:
        shape = (num_rows, num_edits)
        fields += (("edit_ids", shape, "int32"), ("edit_scales", shape, "float32"), ("edit_shifts", shape, "float32"))
    return _place(fields)


def arena_size(layout: Layout) -> int:
    """Bytes of an arena that holds a layout."""
    last = list(layout.values())[-1]
    return last.offset + last.nbytes


def staged_size(step: Layout, sampling: Layout) -> tuple[int, int]:
    """Where a sampling's arena begins behind a step's, and the bytes of both."""
    begins = -(-arena_size(step) // _ALIGN) * _ALIGN
    return begins, begins + arena_size(sampling)


def array_views(arena: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """The arrays that lie in an arena on the host."""
    return {name: arena[s.offset : s.offset + s.nbytes].view(s.dtype).reshape(s.shape) for name, s in layout.items()}


def mask_words(vocab_size: int) -> int:
    """32-bit words of one row's token mask."""
    return -(-vocab_size // 32)


def blank_step_inputs(key: ShapeKey, *, num_groups: int, slot_dtype: str, max_slots: int) -> StepInputs:
    """A step of this shape whose every row and token is padding."""
    layout = step_layout(key, num_groups, slot_dtype)
    staged = np.zeros(staged_size(layout, sampling_layout(key.num_reqs, 0))[1], dtype=np.uint8)
    views = array_views(staged, layout)
    views["token_slots"].fill(max_slots)
    views["sample_slots"].fill(max_slots)
    for group in range(num_groups):
        views[f"block_table_{group}"].fill(NULL_BLOCK)
        views[f"slot_mapping_{group}"].fill(PADDING_SLOT)
    if "score_targets" in views:
        views["score_targets"].fill(-1)
    return step_inputs(key, staged, layout, views, num_rows=0, num_tokens=0, num_samples=0, max_query_len=0)


def step_inputs(
    key: ShapeKey,
    staged: np.ndarray,
    layout: Layout,
    views: Mapping[str, np.ndarray],
    *,
    num_rows: int,
    num_tokens: int,
    num_samples: int,
    max_query_len: int,
) -> StepInputs:
    """StepInputs over the views of an arena, with which `staged` begins."""
    groups = range(sum(name.startswith("block_table_") for name in layout))
    return StepInputs(
        key=key,
        staged=staged,
        arena=staged[: arena_size(layout)],
        sections=layout,
        input_ids=views["input_ids"],
        positions=views["positions"],
        token_slots=views["token_slots"],
        query_start=views["query_start"],
        seq_lens=views["seq_lens"],
        logits_indices=views["logits_indices"],
        sample_slots=views["sample_slots"],
        block_tables=tuple(views[f"block_table_{group}"] for group in groups),
        slot_mappings=tuple(views[f"slot_mapping_{group}"] for group in groups),
        score_targets=views.get("score_targets"),
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_samples=num_samples,
        max_query_len=max_query_len,
    )


def batch_view(
    inputs: StepInputs,
    fields: Mapping[str, Tensor],
    *,
    group: int,
    block_size: int,
    host_lengths: Literal["none", "upper_bound", "exact"] = "none",
) -> BatchView:
    """A KV group's view of a step: `fields` are the step's arrays on the device, and the host's lengths are shown as
    far as the device declares that it wants them."""
    num_rows, exact = inputs.num_rows, host_lengths == "exact"
    return BatchView(
        query_start=fields["query_start"],
        seq_lens=fields["seq_lens"],
        block_table=fields[f"block_table_{group}"],
        slot_mapping=fields[f"slot_mapping_{group}"],
        positions=fields["positions"],
        num_reqs=inputs.key.num_reqs,
        num_tokens=inputs.key.num_tokens,
        max_query_len=inputs.max_query_len,
        block_size=block_size,
        host_query_lens=np.diff(inputs.query_start[: num_rows + 1]),
        host_seq_lens=None if host_lengths == "none" else inputs.seq_lens[:num_rows],
        host_exact=exact,
        host_slot_mapping=inputs.slot_mappings[group][: inputs.num_tokens] if exact else None,
    )


def blank_sampling_inputs(key: ShapeKey, vocab_size: int) -> SamplingInputs:
    """Sampling of padding alone; key.features says whether masks and edits are there."""
    words = mask_words(vocab_size) if "masks" in key.features else 0
    layout = sampling_layout(key.num_reqs, words, edits_width(key.features))
    arena = np.zeros(arena_size(layout), dtype=np.uint8)
    views = array_views(arena, layout)
    if "edit_scales" in views:
        views["edit_scales"].fill(1)
    return sampling_inputs(key, arena, layout, views, num_samples=0, all_greedy=False)


def sampling_inputs(
    key: ShapeKey,
    arena: np.ndarray,
    layout: Layout,
    views: Mapping[str, np.ndarray],
    *,
    num_samples: int,
    all_greedy: bool,
    staged_at: int | None = None,
) -> SamplingInputs:
    """SamplingInputs over an arena's views."""
    return SamplingInputs(
        key=key,
        arena=arena,
        sections=layout,
        masks=views.get("masks"),
        edit_ids=views.get("edit_ids"),
        edit_scales=views.get("edit_scales"),
        edit_shifts=views.get("edit_shifts"),
        num_samples=num_samples,
        all_greedy=all_greedy,
        staged_at=staged_at,
        **{name: views[name] for name in (*SAMPLING_FLOATS, *SAMPLING_INTS)},
    )


def _place(fields: _Fields) -> Layout:
    placed, offset = {}, 0
    for name, shape, dtype in fields:
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        placed[name] = Section(offset=offset, nbytes=nbytes, shape=shape, dtype=dtype)
        offset += -(-nbytes // _ALIGN) * _ALIGN
    return placed
