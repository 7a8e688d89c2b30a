"""What must hold between calls of attention: blocks reused, shared and moved, chunks, repetition, co-tenants."""

from __future__ import annotations

import msgspec
import torch

from anychip_conformance.attention_cases import DECODE, RAGGED, drawn, rows
from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.choices import each_dtype
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase, Call
from anychip_conformance.paged_judge import judge_cache, judge_output


@kind("attn.reused_blocks", corpus=each_dtype(AttentionCase(rows=rows((1, 2, 2), (0, 5, 1)))), quick=3)
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


@kind("attn.shared_prefix", corpus=each_dtype(AttentionCase(rows=rows((1, 0, 2), (1, 0, 3), (1, 0, 1)))), quick=3)
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


@kind("attn.permuted_blocks", corpus=each_dtype(AttentionCase(rows=RAGGED)), drawn=drawn(), examples=20, quick=3)
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
