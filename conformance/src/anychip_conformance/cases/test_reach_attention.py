"""Attention at the sizes of real models (reach.REACH): long contexts with a few keys that count, long block tables,
many rows, long chunks, many heads, wide heads, wide windows, far positions."""

from __future__ import annotations

import msgspec

from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.cases import test_attention, test_attention_lse, test_attention_scores, test_attention_storage
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase
from anychip_conformance.visits import Visit, VisitCase, Visits

_DEADLINE_S = 240.0
ONE = AttentionCase(rows=(Row(0, 0, 1),), num_heads=1, num_kv_heads=1, head_dim=16, needles=True)
FEW = AttentionCase(rows=(Row(0, 5, 1), Row(0, 0, 3), Row(1, 2, 1)), head_dim=16)


def one(*rows: tuple[int, int, int], **more: object) -> AttentionCase:
    """One head, whose contexts have needles."""
    return msgspec.structs.replace(ONE, rows=tuple(Row(*row) for row in rows), **more)


def few(**more: object) -> AttentionCase:
    return msgspec.structs.replace(FEW, **more)


CONTEXTS = Visits(
    (
        Visit(test_attention.decode, "context", lambda n: one((0, n - 1, 1)), variant="of one head"),
        Visit(
            test_attention.decode,
            "context",
            lambda n: one((0, n - 1, 1), (0, 3, 1), num_heads=4, num_kv_heads=2),
            sizes=(513, 4096, 4097, 32_769),
            variant="of a group",
        ),
        Visit(
            test_attention.chunk,
            "context",
            lambda n: one((0, n - 5, 5), dtype="narrow"),
            sizes=(1024, 1025, 4097, 8192, 32_767, 65_537, 131_072),
            variant="of a chunk",
        ),
        Visit(
            test_attention_lse.log_sum_exp,
            "context",
            lambda n: one((0, n - 1, 1), lse=True),
            sizes=(4097, 8192, 32_769, 131_072),
        ),
        Visit(test_attention_scores.sinks, "context", lambda n: one((0, n - 1, 1), sinks=True), least=4095, most=8193),
        Visit(test_attention_scores.alibi, "context", lambda n: one((0, n - 1, 1), alibi=True), least=255, most=8193),
        Visit(test_attention.decode, "pages", lambda n: one((n - 1, 1, 1), (0, 2, 1))),
    )
)


@kind("attn.reach_context", corpus=CONTEXTS.corpus, quick=1, deadline_s=_DEADLINE_S)
def context(device: Device, case: VisitCase) -> None:
    """Contexts up to 131,072 keys and block tables of 8,192 pages: no key is missed, the last and those around every
    size where something changes least of all."""
    CONTEXTS.check(device, case)


BYTES = Visits(
    tuple(
        Visit(
            test_attention_storage.kv_quantized,
            "context",
            lambda n, kv=kv: one((0, n - 1, 1), kv=kv),  # type: ignore[misc]
            sizes=(257, 4097, 32_769, 65_537),
            variant=kv,
        )
        for kv in ("fp8", "int8")
    )
)


@kind("attn.reach_bytes", profile="quantization", corpus=BYTES.corpus, deadline_s=_DEADLINE_S)
def byte_context(device: Device, case: VisitCase) -> None:
    """Long contexts in caches of one byte per value."""
    BYTES.check(device, case)


def _rows(count: int) -> tuple[Row, ...]:
    return tuple(Row(0, row % 5, 1) for row in range(count))


def _mixed(tokens: int) -> tuple[Row, ...]:
    """Rows of at most 48 tokens."""
    sizes = [min(48, tokens - at) for at in range(0, tokens, 48)]
    return tuple(Row(0, row % 3, size) for row, size in enumerate(sizes))


BATCHES = Visits(
    (
        Visit(test_attention.decode, "rows", lambda n: few(rows=_rows(n), num_heads=2, num_kv_heads=1)),
        Visit(
            test_attention_lse.log_sum_exp,
            "rows",
            lambda n: few(rows=_rows(n), num_heads=2, num_kv_heads=1, lse=True),
            least=64,
            most=257,
        ),
        Visit(test_attention.mixed, "tokens", lambda n: few(rows=_mixed(n), num_heads=1, num_kv_heads=1)),
        Visit(
            test_attention.prefill,
            "chunk",
            lambda n: few(rows=(Row(0, 0, n), Row(0, 0, 1)), num_heads=1, num_kv_heads=1),
        ),
        Visit(
            test_attention.chunk, "chunk", lambda n: few(rows=(Row(0, 21, n),), num_heads=2, num_kv_heads=1), most=513
        ),
    )
)


@kind("attn.reach_batch", corpus=BATCHES.corpus, quick=1, deadline_s=_DEADLINE_S)
def batch(device: Device, case: VisitCase) -> None:
    """Steps of many rows, of many tokens, and of one long chunk: the last row and the last token are as right as the
    first."""
    BATCHES.check(device, case)


HEADS = Visits(
    (
        Visit(test_attention.gqa, "heads", lambda n: few(num_heads=n, num_kv_heads=n), variant="each its own"),
        Visit(
            test_attention.gqa,
            "heads",
            lambda n: few(num_heads=n, num_kv_heads=n // 8),
            sizes=(16, 32, 64, 96, 128),
            variant="in groups of 8",
        ),
        Visit(test_attention.gqa, "group", lambda n: few(num_heads=n, num_kv_heads=1), variant="one KV head"),
        Visit(
            test_attention.gqa, "group", lambda n: few(num_heads=2 * n, num_kv_heads=2), most=48, variant="two KV heads"
        ),
        Visit(
            test_attention_storage.rotary,
            "heads",
            lambda n: few(num_heads=n, num_kv_heads=n, rope="neox", qk_norm=True),
            least=32,
        ),
        Visit(test_attention_scores.sinks, "heads", lambda n: few(num_heads=n, num_kv_heads=1, sinks=True), least=63),
        Visit(
            test_attention_scores.alibi,
            "heads",
            lambda n: few(num_heads=n, num_kv_heads=1, alibi=True),
            least=63,
        ),
        Visit(test_attention.head_dim, "head_dim", lambda n: few(head_dim=n, any_head_dim=False)),
        Visit(
            test_attention.head_dim,
            "head_dim",
            lambda n: few(head_dim=n, any_head_dim=False, dtype="narrow", rope="neox", qk_norm=True),
            variant="rotated",
        ),
    )
)


@kind("attn.reach_heads", corpus=HEADS.corpus, quick=2, deadline_s=_DEADLINE_S)
def heads(device: Device, case: VisitCase) -> None:
    """Many heads, large groups, one KV head for all, wide heads: each query head reads its own KV head and sink."""
    HEADS.check(device, case)


WINDOWS = Visits(
    (
        Visit(test_attention_scores.window, "window", lambda n: one((0, n + 37, 1), window=n), variant="one query"),
        Visit(
            test_attention_scores.window,
            "window",
            lambda n: one((0, n - 9, 18), window=n),
            most=4097,
            variant="a chunk across its edge",
        ),
    )
)


@kind("attn.reach_window", corpus=WINDOWS.corpus, quick=1, deadline_s=_DEADLINE_S)
def window(device: Device, case: VisitCase) -> None:
    """Wide windows end at their own key: keys before it would outweigh everything."""
    WINDOWS.check(device, case)


POSITIONS = Visits(
    tuple(
        Visit(
            test_attention_storage.rotary,
            "positions",
            lambda n, style=style: one((0, n, 2), num_heads=2, needles=False, window=7, rope=style),  # type: ignore[misc]
            sizes=sizes,
            variant=style,
        )
        for style, sizes in (("neox", (4096, 32_769, 131_071)), ("interleaved", (4097, 65_537)))
    )
)


@kind("attn.reach_position", corpus=POSITIONS.corpus, quick=0, deadline_s=_DEADLINE_S)
def position(device: Device, case: VisitCase) -> None:
    """Queries and keys turn by positions up to 131,071, of which a window sees the last few."""
    POSITIONS.check(device, case)
