"""Masks and scores of attention: windows, softcaps, ALiBi, sinks, large scores, long sums."""

from __future__ import annotations

from hypothesis import strategies as st

from anychip_conformance.attention_cases import DECODE, RAGGED, drawn, rows
from anychip_conformance.case import kind
from anychip_conformance.choices import each_dtype
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase
from anychip_conformance.paged_judge import check_attention


@kind(
    "attn.window",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, window=4),
        AttentionCase(rows=DECODE, window=1),
        AttentionCase(rows=rows((2, 0, 1), (3, 5, 1), (2, 3, 9)), window=17, seed=2),
        AttentionCase(rows=rows((0, 0, 30)), window=8),
    ),
    drawn=drawn(window=st.sampled_from([1, 2, 5, 15, 16, 17, 31, 32, 33, 100])),
)
def window(device: Device, case: AttentionCase) -> None:
    """A query at p sees p - window + 1 to p, in prefill, in chunks and in decode; blocks before that are the null
    block, full of poison."""
    check_attention(device, case)


@kind(
    "attn.softcap",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, softcap=2.0, magnitude=4.0),
        AttentionCase(rows=DECODE, softcap=30.0, scale=1.0, magnitude=4.0),
    ),
    drawn=drawn(softcap=st.sampled_from([0.5, 5.0, 50.0]), magnitude=st.sampled_from([1.0, 8.0])),
)
def softcap(device: Device, case: AttentionCase) -> None:
    """cap tanh(score / cap), of the scaled score, before the mask."""
    check_attention(device, case)


@kind(
    "attn.alibi",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, alibi=True),
        AttentionCase(rows=DECODE, alibi=True, num_heads=8, num_kv_heads=2),
    ),
    drawn=drawn(alibi=True),
)
def alibi(device: Device, case: AttentionCase) -> None:
    """Each query head's own slope times the distance of the key, added to the score."""
    check_attention(device, case)


@kind(
    "attn.sinks",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, sinks=True),
        AttentionCase(rows=DECODE, sinks=True, window=6, num_heads=8, num_kv_heads=4),
    ),
    drawn=drawn(sinks=True, window=st.sampled_from([None, 9])),
)
def sinks(device: Device, case: AttentionCase) -> None:
    """A sink takes part in its head's softmax and adds no value."""
    check_attention(device, case)


@kind(
    "attn.large_scores",
    corpus=[
        AttentionCase(rows=RAGGED, magnitude=400.0),
        AttentionCase(rows=DECODE, magnitude=2000.0),
        AttentionCase(rows=rows((0, 0, 20)), dtype="narrow", magnitude=60.0),
    ],
)
def large_scores(device: Device, case: AttentionCase) -> None:
    """Scores whose exponentials overflow float32: the maximum is subtracted first."""
    check_attention(device, case)


@kind(
    "attn.long",
    corpus=[
        AttentionCase(rows=rows((0, 1500, 1)), dtype="narrow", magnitude=0.1, value_offset=1.0, head_dim=32),
        AttentionCase(rows=rows((0, 1000, 3), (0, 2047, 1)), magnitude=0.5, value_offset=2.0),
    ],
)
def long(device: Device, case: AttentionCase) -> None:
    """Thousands of nearly equal weights: sums are kept in float32, and partial results of a split over keys are
    rescaled before they are added."""
    check_attention(device, case)
