"""A step's arrays in their arena, what a KV group sees of them, and blank inputs for capturing and compiling ahead."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from anychip.plugin_api.encoder import EncoderView
from anychip.plugin_api.graph import DRAFTS, MASKS, ShapeKey
from anychip.plugin_api.plan import BatchView
from anychip.plugin_api.state import StateView
from anychip.plugin_api.step_arrays import ALIGN, Layout, held_arrays, layout_of
from anychip.plugin_api.step_inputs import NUM_AXES, STATES, SamplingInputs, StepInputs

if TYPE_CHECKING:
    from torch import Tensor

_REMEMBERED = 1024
"""Layouts kept: a device without buckets has a shape of its own for nearly every step."""


@lru_cache(_REMEMBERED)
def step_layout(key: ShapeKey, *, num_groups: int, slot_dtype: str, max_slots: int, states: bool = False) -> Layout:
    """The arrays of StepInputs, by name. `num_groups` are those of tokens; `states`: the model has state layers."""
    sizes = {
        "num_tokens": key.num_tokens,
        "num_reqs": key.num_reqs,
        "num_reqs + 1": key.num_reqs + 1,
        "num_samples": key.num_samples,
        "num_pages": key.num_pages,
        "max_slots": max_slots,
        "num_axes": NUM_AXES,
    }
    features = (*key.features, STATES) if states else key.features
    return layout_of(StepInputs, sizes, features=features, num_groups=num_groups, slot_dtype=slot_dtype)


@lru_cache(_REMEMBERED)
def sampling_layout(num_samples: int, mask_words: int, *, drafts: bool = False) -> Layout:
    """The arrays of SamplingInputs, by name; mask_words 0: no masks."""
    sizes = {"num_samples": num_samples, "mask_words": mask_words}
    features = ((DRAFTS,) if drafts else ()) + ((MASKS,) if mask_words else ())
    return layout_of(SamplingInputs, sizes, features=features)


def arena_size(layout: Layout) -> int:
    """Bytes of an arena that holds a layout."""
    last = list(layout.values())[-1]
    return last.offset + last.nbytes


def staged_size(step: Layout, sampling: Layout) -> tuple[int, int]:
    """Where a sampling's arena begins behind a step's, and the bytes of both."""
    begins = -(-arena_size(step) // ALIGN) * ALIGN
    return begins, begins + arena_size(sampling)


def array_views(arena: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """The arrays that lie in an arena on the host."""
    return {name: np.ndarray(s.shape, s.dtype, arena, s.offset) for name, s in layout.items()}


def mask_words(vocab_size: int) -> int:
    """32-bit words of one row's token mask."""
    return -(-vocab_size // 32)


def blank_step_inputs(
    key: ShapeKey, *, num_groups: int, slot_dtype: str, max_slots: int, states: bool = False
) -> StepInputs:
    """A step of this shape whose every row and token is padding."""
    layout = step_layout(key, num_groups=num_groups, slot_dtype=slot_dtype, max_slots=max_slots, states=states)
    staged = np.zeros(staged_size(layout, sampling_layout(key.num_samples, 0))[1], dtype=np.uint8)
    views = _blank(staged, layout)
    sizes = {"num_rows": 0, "num_tokens": 0, "num_samples": 0, "max_query_len": 0}
    return step_inputs(key, staged, layout, views, **sizes, has_drafts=False)


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
    has_drafts: bool,
    num_tapped: int = 0,
) -> StepInputs:
    """StepInputs over the views of an arena, with which `staged` begins."""
    return StepInputs(
        key=key,
        staged=staged,
        arena=staged[: arena_size(layout)],
        sections=layout,
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_samples=num_samples,
        max_query_len=max_query_len,
        has_drafts=has_drafts,
        num_tapped=num_tapped,
        **held_arrays(StepInputs, views),
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


def state_view(inputs: StepInputs, fields: Mapping[str, Tensor]) -> StateView:
    """A step as state layers see it: `fields` are the step's arrays on the device."""
    return StateView(
        query_start=fields["query_start"],
        seq_lens=fields["seq_lens"],
        state_blocks=fields["state_blocks"],
        num_reqs=inputs.key.num_reqs,
        num_tokens=inputs.key.num_tokens,
        max_query_len=inputs.max_query_len,
        host_query_lens=np.diff(inputs.query_start[: inputs.num_rows + 1]),
    )


def encoder_view(inputs: StepInputs, fields: Mapping[str, Tensor]) -> EncoderView:
    """A step as encoder layers see it: `fields` are the step's arrays on the device."""
    return EncoderView(
        query_start=fields["query_start"],
        positions=fields["positions"],
        num_reqs=inputs.key.num_reqs,
        num_tokens=inputs.key.num_tokens,
        max_query_len=inputs.max_query_len,
        host_query_lens=np.diff(inputs.query_start[: inputs.num_rows + 1]),
    )


def blank_sampling_inputs(key: ShapeKey, vocab_size: int) -> SamplingInputs:
    """Sampling of padding alone; key.features says whether masks and drafts are there."""
    words = mask_words(vocab_size) if MASKS in key.features else 0
    layout = sampling_layout(key.num_samples, words, drafts=DRAFTS in key.features)
    arena = np.zeros(arena_size(layout), dtype=np.uint8)
    return sampling_inputs(key, arena, layout, _blank(arena, layout), num_samples=0, all_greedy=False)


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
        num_samples=num_samples,
        all_greedy=all_greedy,
        staged_at=staged_at,
        **held_arrays(SamplingInputs, views),
    )


def _blank(arena: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    views = array_views(arena, layout)
    for name, section in layout.items():
        views[name].fill(section.padding)
    return views
