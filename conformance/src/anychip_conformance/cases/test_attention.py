"""Paged attention over every shape of batch: prefill, chunks, decode, mixtures; heads, block sizes, scales."""

from __future__ import annotations

from hypothesis import strategies as st

from anychip.plugin_api import Unsupported
from anychip_conformance.attention_cases import DECODE, EDGES, RAGGED, drawn, rows
from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.choices import each_dtype
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase, backend_for
from anychip_conformance.paged_judge import check_attention


@kind(
    "attn.prefill",
    corpus=each_dtype(
        AttentionCase(rows=rows((0, 0, 7))),
        AttentionCase(rows=rows((0, 0, 1), (0, 0, 16), (0, 0, 17)), head_dim=32),
        AttentionCase(rows=rows((0, 0, 40)), num_heads=4, num_kv_heads=1, head_dim=24),
    ),
    drawn=drawn(rows=st.lists(st.builds(Row, st.just(0), st.just(0), st.integers(1, 40)), min_size=1).map(tuple)),
)
def prefill(device: Device, case: AttentionCase) -> None:
    """Whole prompts: a query sees itself and what came before it, and no future key."""
    check_attention(device, case)


@kind(
    "attn.chunk",
    corpus=each_dtype(
        AttentionCase(rows=rows((1, 0, 5))),
        AttentionCase(rows=rows((1, 1, 3), (2, -1, 9), (0, 5, 4)), seed=1),
    ),
    drawn=drawn(
        rows=st.lists(st.builds(Row, st.integers(0, 3), EDGES, st.integers(2, 20)), min_size=1, max_size=4).map(tuple)
    ),
)
def chunk(device: Device, case: AttentionCase) -> None:
    """Later chunks of a prompt: the mask hangs from the lower right corner; a chunk sees itself and all before it."""
    check_attention(device, case)


@kind(
    "attn.decode",
    corpus=each_dtype(
        AttentionCase(rows=DECODE),
        AttentionCase(rows=rows((4, 0, 1)), num_heads=8, num_kv_heads=2, head_dim=64),
        AttentionCase(rows=rows(*[(0, length, 1) for length in range(9)]), num_heads=6, num_kv_heads=2, head_dim=48),
    ),
    drawn=drawn(rows=st.lists(st.builds(Row, st.integers(0, 4), EDGES, st.just(1)), min_size=1, max_size=9).map(tuple)),
)
def decode(device: Device, case: AttentionCase) -> None:
    """One query a row, over contexts that end before, at and after a block's edge."""
    check_attention(device, case)


@kind(
    "attn.mixed",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED),
        AttentionCase(rows=(*RAGGED, *DECODE), page=1, num_heads=6, num_kv_heads=2, head_dim=40, strided=True, seed=3),
    ),
    drawn=drawn(),
    examples=80,
)
def mixed(device: Device, case: AttentionCase) -> None:
    """Prefill, chunks and decode in one plan, each row over its own blocks, empty rows among them."""
    check_attention(device, case)


@kind(
    "attn.block_size",
    corpus=[
        AttentionCase(rows=rows((1, 3, 2), (0, 2, 1)), page=page, dtype=dtype)  # type: ignore[arg-type]
        for page in range(5)
        for dtype in ("any", "narrow")
    ],
    quick=4,
)
def block_size(device: Device, case: AttentionCase) -> None:
    """Every block size that the backend's layout offers, not only 16."""
    check_attention(device, case)


@kind(
    "attn.gqa",
    corpus=[
        AttentionCase(rows=rows((1, 2, 3), (0, 9, 1)), num_heads=heads, num_kv_heads=kv_heads)
        for heads, kv_heads in ((1, 1), (8, 1), (8, 2), (8, 4), (8, 8), (6, 3), (7, 7), (12, 2))
    ],
    quick=4,
)
def gqa(device: Device, case: AttentionCase) -> None:
    """Query head h reads KV head h // (num_heads / num_kv_heads), for every ratio."""
    check_attention(device, case)


@kind(
    "attn.head_dim",
    corpus=[
        AttentionCase(rows=rows((1, 1, 4), (1, 0, 1)), head_dim=dim, any_head_dim=False, dtype=dtype)  # type: ignore[arg-type]
        for dim in (8, 16, 40, 64, 72, 80, 96, 112, 128, 192, 256)
        for dtype in ("any", "narrow")
    ],
    quick=6,
)
def head_dim(device: Device, case: AttentionCase) -> None:
    """Head dimensions, also those that are no power of two."""
    check_attention(device, case)


@kind(
    "attn.scale",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, scale=0.5),
        AttentionCase(rows=DECODE, scale=0.02, head_dim=32),
        AttentionCase(rows=RAGGED, scale=1.0, head_dim=8),
    ),
    quick=3,
)
def scale(device: Device, case: AttentionCase) -> None:
    """The caller's scale, also where it is not 1 / sqrt(head_dim)."""
    check_attention(device, case)


@kind(
    "attn.refused",
    corpus=[
        AttentionCase(rows=DECODE, alibi=True),
        AttentionCase(rows=DECODE, sinks=True),
        AttentionCase(rows=DECODE, softcap=5.0),
        AttentionCase(rows=DECODE, window=5),
        AttentionCase(rows=DECODE, head_dim=20, any_head_dim=False),
        AttentionCase(rows=DECODE, lse=True),
    ],
    quick=5,
)
def refused(device: Device, case: AttentionCase) -> None:
    """A factory serves what the device declares, and refuses the rest with Unsupported and a reason."""
    try:
        backend_for(device, case)
    except Unsupported as refusal:
        raise AssertionError(f"declared, and refused: {refusal}") from None
    device.only_made()
