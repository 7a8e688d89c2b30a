"""Paged attention: every batch shape, mask and score variant, against the oracle over what the cache holds.

Sizes of rows count in the device's blocks: Row(blocks, extra, query) has blocks x block_size + extra tokens of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from hypothesis import strategies as st

from anychip.plugin_api import Unsupported
from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase, Call, backend_for, check_attention, judge_cache, judge_output

DTYPES = ("float32", "bfloat16", "float16")


def each_dtype(*cases: AttentionCase) -> list[AttentionCase]:
    return [msgspec.structs.replace(case, dtype=dtype) for case in cases for dtype in DTYPES]


def rows(*sizes: Sequence[int]) -> tuple[Row, ...]:
    return tuple(Row(*size) for size in sizes)


RAGGED = rows((0, 0, 5), (1, 0, 1), (2, 1, 3), (0, 0, 1), (1, -1, 2), (3, 0, 1))
DECODE = rows((0, 1, 1), (1, -1, 1), (1, 0, 1), (1, 1, 1), (2, 3, 1))

# -- tier B ---------------------------------------------------------------------------------------------------

_edges = st.sampled_from([-1, 0, 1, 2, 7])
_row = st.one_of(
    st.builds(Row, st.integers(0, 3), _edges, st.just(1)),
    st.builds(Row, st.integers(0, 2), _edges, st.sampled_from([1, 2, 3, 8, 15, 16, 17])),
    st.builds(Row, st.just(0), st.just(0), st.sampled_from([1, 2, 16, 17, 33])),
    st.builds(Row, st.just(0), st.just(0), st.just(0)),
)
_heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (6, 2), (8, 8), (3, 1), (5, 5)])


@st.composite
def drawn(draw: Any, **fixed: Any) -> AttentionCase:
    """Any batch; `fixed` are strategies or values of fields that a kind is about."""
    num_heads, num_kv_heads = draw(_heads)
    values = {
        "rows": tuple(draw(st.lists(_row, min_size=1, max_size=5).filter(lambda r: any(row.query for row in r)))),
        "dtype": draw(st.sampled_from(["any", "narrow"])),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([8, 16, 24, 32, 48, 64, 80])),
        "page": draw(st.integers(0, 4)),
        "pad_tokens": draw(st.sampled_from([0, 0, 1, 3])),
        "pad_rows": draw(st.sampled_from([0, 0, 2])),
        "strided": draw(st.booleans()),
        "guarded": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }
    values |= {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in fixed.items()}
    return AttentionCase(**values)


# -- batches --------------------------------------------------------------------------------------------------


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
        rows=st.lists(st.builds(Row, st.integers(0, 3), _edges, st.integers(2, 20)), min_size=1, max_size=4).map(tuple)
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
    drawn=drawn(
        rows=st.lists(st.builds(Row, st.integers(0, 4), _edges, st.just(1)), min_size=1, max_size=9).map(tuple)
    ),
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
        AttentionCase(rows=rows((1, 1, 4), (1, 0, 1)), head_dim=dim, dtype=dtype)  # type: ignore[arg-type]
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
    quick=1,
)
def scale(device: Device, case: AttentionCase) -> None:
    """The caller's scale, also where it is not 1 / sqrt(head_dim)."""
    check_attention(device, case)


# -- masks and scores -----------------------------------------------------------------------------------------


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


# -- storage --------------------------------------------------------------------------------------------------


@kind(
    "attn.padding",
    corpus=[
        AttentionCase(rows=RAGGED, pad_tokens=5),
        AttentionCase(rows=DECODE, pad_tokens=3, pad_rows=3, guarded=True),
        AttentionCase(rows=rows((0, 0, 3)), pad_tokens=1, guarded=True, dtype="narrow"),
        AttentionCase(rows=rows((0, 0, 0), (1, 0, 2), (0, 0, 0), (0, 3, 1)), pad_rows=1, guarded=True),
    ],
)
def padding(device: Device, case: AttentionCase) -> None:
    """Padded rows come back as zeros, are written nowhere, and nothing is written past the output's ends."""
    check_attention(device, case)


@kind(
    "attn.strides",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, strided=True),
        AttentionCase(rows=rows((1, 0, 1)), strided=True, num_heads=4, num_kv_heads=1),
    ),
    quick=1,
)
def strides(device: Device, case: AttentionCase) -> None:
    """q, k and v may be slices of one packed projection; none of them is changed."""
    check_attention(device, case)


@kind(
    "attn.far_blocks",
    corpus=[
        AttentionCase(rows=rows((1, 1, 1), (0, 2, 3)), far=True, dtype="narrow", head_dim=64),
        AttentionCase(
            rows=rows(
                (1, 3, 1),
            ),
            far=True,
            dtype="float32",
            head_dim=64,
        ),
    ],
)
def far_blocks(device: Device, case: AttentionCase) -> None:
    """Block ids whose offset does not fit 32 bits."""
    check_attention(device, case)


@kind(
    "attn.kv_quantized",
    profile="quantization",
    corpus=[
        AttentionCase(rows=shape, kv=kv, dtype=dtype, head_scales=per_head)  # type: ignore[arg-type]
        for kv in ("fp8", "int8")
        for dtype in ("any", "narrow")
        for shape, per_head in ((RAGGED, False), (DECODE, True))
    ],
    drawn=drawn(kv=st.sampled_from(["fp8", "int8"]), head_scales=st.booleans()),
)
def kv_quantized(device: Device, case: AttentionCase) -> None:
    """A cache of one byte a value: the layer's scales on the way in and out, saturation instead of NaN."""
    check_attention(device, case)


@kind(
    "attn.rotary",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, rope="neox"),
        AttentionCase(rows=RAGGED, rope="interleaved"),
        AttentionCase(rows=DECODE, rope="neox", rotary_fraction=0.5, head_dim=32),
        AttentionCase(rows=RAGGED, rope="neox", qk_norm=True, pad_tokens=2),
        AttentionCase(rows=DECODE, rope="none", qk_norm=True),
    ),
    drawn=drawn(
        rope=st.sampled_from(["none", "neox", "interleaved"]),
        rotary_fraction=st.sampled_from([1.0, 0.5, 0.25]),
        qk_norm=st.booleans(),
    ),
)
def rotary(device: Device, case: AttentionCase) -> None:
    """Norm of queries and keys, then rotary at each token's own position; keys rest rotated in the cache."""
    check_attention(device, case)


@kind("attn.read_only", corpus=each_dtype(AttentionCase(rows=RAGGED, read_only=True)), drawn=drawn(read_only=True))
def read_only(device: Device, case: AttentionCase) -> None:
    """k and v None: the layer attends over what another layer wrote, and writes nothing."""
    check_attention(device, case)


# -- relations between calls ----------------------------------------------------------------------------------


@kind("attn.reused_blocks", corpus=each_dtype(AttentionCase(rows=rows((1, 2, 2), (0, 5, 1)))), quick=1)
def reused_blocks(device: Device, case: AttentionCase) -> None:
    """Blocks given to another request hold its keys, whatever the backend saw there before."""
    first = Call.make(device, case)
    first.run()
    again = Call.make(device, msgspec.structs.replace(case, seed=case.seed + 1), tables=first.batch.tables)
    ids = again.watched
    data = again.backend.export_blocks(again.cache, ids)
    first.cache = first.backend.import_blocks(first.cache, ids, data)
    first.q, first.k, first.v = again.q, again.k, again.v
    before = first.blocks().clone()
    result = first.run()
    judge_cache(device, first, before, None)
    judge_output(device, first, result)


@kind("attn.shared_prefix", corpus=each_dtype(AttentionCase(rows=rows((1, 0, 2), (1, 0, 3), (1, 0, 1)))), quick=1)
def shared_prefix(device: Device, case: AttentionCase) -> None:
    """Rows that share a prefix block read it, and leave it as it is."""
    probe = Call.make(device, case)
    shared = probe.batch.tables[0][0]
    tables = [[shared, *table[1:]] for table in probe.batch.tables]
    call = Call.make(device, case, tables=tables)
    before = call.blocks().clone()
    result = call.run()
    judge_cache(device, call, before, None)
    judge_output(device, call, result)


@kind("attn.permuted_blocks", corpus=each_dtype(AttentionCase(rows=RAGGED)), drawn=drawn(), examples=20, quick=1)
def permuted_blocks(device: Device, case: AttentionCase) -> None:
    """Where a request's blocks lie changes no bit of its result."""
    first = Call.make(device, case)
    count = len(first.watched)
    # The same content at other places: ids 1 .. n in reverse order.
    moved = [[count - block for block in table] for table in first.batch.tables]
    second = Call.make(device, case, tables=moved)
    device.same_bits("output with blocks elsewhere", *_outputs(second, first))


def _outputs(*calls: Call) -> list[torch.Tensor]:
    return [call.run()[: call.batch.num_tokens].contiguous() for call in calls]


@kind("attn.two_steps", corpus=each_dtype(AttentionCase(rows=rows((1, 3, 6), (0, 0, 9)))), drawn=drawn(), examples=20)
def two_steps(device: Device, case: AttentionCase) -> None:
    """A prompt in two chunks, the second over what the first wrote, is right in both."""
    call = Call.make(device, case)
    rows_now = [row for row in case.rows if row.query or device.capabilities.padding == "zero_rows"]
    size = call.block_size
    halves = [(Row(0, row.context(size), (row.query + 1) // 2), row.query // 2) for row in rows_now]
    first = Call.make(
        device,
        msgspec.structs.replace(case, rows=tuple(row for row, _ in halves)),
        tables=call.batch.tables,
        num_blocks=len(call.watched),
    )
    judge_output(device, first, first.run())
    rest = tuple(Row(0, row.extra + row.query, more) for row, more in halves)
    if not any(row.query for row in rest) or (
        device.capabilities.padding != "zero_rows" and not all(r.query for r in rest)
    ):
        return
    second = Call.make(
        device,
        msgspec.structs.replace(case, rows=rest, seed=case.seed + 1),
        tables=call.batch.tables,
        num_blocks=len(call.watched),
    )
    second.cache = first.cache
    second.backend = first.backend
    second.layer = first.layer
    second.raw = first.raw
    before = second.blocks().clone()
    result = second.run()
    judge_cache(device, second, before, None)
    judge_output(device, second, result)


@kind("attn.repeat", profile="deterministic", corpus=each_dtype(AttentionCase(rows=(*RAGGED, *DECODE))), quick=0)
def repeat(device: Device, case: AttentionCase) -> None:
    """The same call gives the same bits."""
    device.same_bits("output of the second run", *_outputs(Call.make(device, case), Call.make(device, case)))


@kind(
    "attn.batch_invariant",
    profile="deterministic",
    corpus=each_dtype(AttentionCase(rows=(*RAGGED, *DECODE), invariant=True)),
    quick=0,
)
def batch_invariant(device: Device, case: AttentionCase) -> None:
    """Where batch invariance is declared, a row's bits do not depend on who shares the batch."""
    whole = Call.make(device, case)
    result = whole.run()
    for row, (start, query) in enumerate(zip(whole.batch.starts, whole.batch.queries, strict=True)):
        if query == 0:
            continue
        alone = Call.make(
            device,
            msgspec.structs.replace(case, rows=(case.rows[row],)),
            tables=[whole.batch.tables[row]],
            num_blocks=len(whole.watched),
        )
        ids = whole.batch.tables[row]
        alone.cache = alone.backend.import_blocks(alone.cache, ids, whole.backend.export_blocks(whole.cache, ids))
        mine = slice(start, start + query)
        alone.q = _padded_like(alone.q, whole.q[mine])
        assert whole.k is not None and whole.v is not None and alone.k is not None and alone.v is not None
        alone.k, alone.v = _padded_like(alone.k, whole.k[mine]), _padded_like(alone.v, whole.v[mine])
        device.same_bits(f"row {row} alone", alone.run()[:query].contiguous(), result[mine].contiguous())


def _padded_like(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    filled = target.clone()
    filled[: len(values)] = values
    return filled


# -- what is not served ---------------------------------------------------------------------------------------


@kind(
    "attn.refused",
    corpus=[
        AttentionCase(rows=DECODE, alibi=True),
        AttentionCase(rows=DECODE, sinks=True),
        AttentionCase(rows=DECODE, softcap=5.0),
        AttentionCase(rows=DECODE, window=5),
        AttentionCase(rows=DECODE, head_dim=20),
    ],
    quick=5,
)
def refused(device: Device, case: AttentionCase) -> None:
    """A factory serves what the device declares, and refuses the rest with Unsupported and a reason."""
    try:
        backend_for(device, case)
    except Unsupported as refusal:
        raise AssertionError(f"declared, and refused: {refusal}") from None
