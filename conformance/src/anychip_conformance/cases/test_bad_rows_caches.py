"""One bad row, and rows without tokens, in what keeps something of a row: attention of three forms, and states."""

from __future__ import annotations

import msgspec

from anychip.plugin_api import RECURRENCES
from anychip_conformance.attention_cases import rows
from anychip_conformance.bad_values import Fill, check_others
from anychip_conformance.case import kind
from anychip_conformance.cases.test_encoder import EncoderCase
from anychip_conformance.choices import resolved
from anychip_conformance.device import Device
from anychip_conformance.latent_calls import LatentCall, LatentCase
from anychip_conformance.paged import AttentionCase
from anychip_conformance.paged_judge import check_attention
from anychip_conformance.recurrence_calls import RecurrenceCall, RecurrenceCase
from anychip_conformance.row_calls_caches import encoder_call, latent_call, paged_call, state_call
from anychip_conformance.state_calls import StateRow

DECODE = rows((1, 1, 1), (0, 3, 1), (2, -1, 1), (1, 0, 1))
MIXED = rows((0, 0, 9), (1, 2, 1), (0, 5, 4), (0, 0, 3))
EDGES = (0, 2)
"""The first row and one between others are bad."""
LAST = (1, 3)


class BadAttentionCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: AttentionCase
    bad: tuple[int, ...]
    fill: Fill = "nan"


@kind(
    "attn.bad_rows",
    corpus=[
        BadAttentionCase(call=AttentionCase(rows=shape, dtype=dtype, **settings), bad=bad, fill=fill)  # type: ignore[arg-type]
        for shape, bad, fill in ((DECODE, EDGES, "nan"), (MIXED, LAST, "mixed"))
        for dtype, settings in (
            ("any", {}),
            ("narrow", {"head_dim": 64, "num_heads": 8}),
            ("any", {"rope": "neox", "qk_norm": True, "pad_tokens": 3, "pad_rows": 1}),
            ("any", {"window": 5}),
            ("any", {"sinks": True, "softcap": 5.0}),
        )
    ],
    quick=4,
)  # fmt: skip
def bad_attention(device: Device, case: BadAttentionCase) -> None:
    """A sequence whose queries, keys and values are no numbers leaves every bit of the others' outputs, and of what the
    cache holds of them."""
    call = resolved(case.call, device)
    check_others(device, lambda: paged_call(device, call), case.bad, case.fill)


@kind(
    "attn.bad_rows_quantized",
    profile="quantization",
    corpus=[
        BadAttentionCase(call=AttentionCase(rows=shape, kv=kv), bad=EDGES, fill=fill)  # type: ignore[arg-type]
        for kv in ("fp8", "int8")
        for shape, fill in ((DECODE, "nan"), (MIXED, "mixed"))
    ],
)
def bad_attention_quantized(device: Device, case: BadAttentionCase) -> None:
    """So it is in a cache of one byte a value."""
    call = resolved(case.call, device)
    check_others(device, lambda: paged_call(device, call), case.bad, case.fill)


@kind(
    "attn.bad_rows_lse",
    corpus=[BadAttentionCase(call=AttentionCase(rows=DECODE, lse=True), bad=EDGES)],
)
def bad_attention_lse(device: Device, case: BadAttentionCase) -> None:
    """So it is with the log-sum-exp."""
    call = resolved(case.call, device)
    check_others(device, lambda: paged_call(device, call), case.bad, case.fill)


NONE = (0, 0, 0)


@kind(
    "attn.empty_rows",
    corpus=[
        AttentionCase(rows=rows(*shape), dtype=dtype, guarded=True, **settings)  # type: ignore[arg-type]
        for shape in (
            (NONE, (1, 1, 1), NONE, NONE, (0, 3, 1), (2, 0, 1), NONE),
            ((0, 0, 9), NONE, (1, 2, 5), NONE),
            (NONE, NONE, (0, 7, 1)),
        )
        for dtype, settings in (("any", {}), ("narrow", {"head_dim": 64}), ("any", {"window": 4, "pad_rows": 2}))
    ],
    quick=3,
)
def empty_rows(device: Device, case: AttentionCase) -> None:
    """Rows without a token stand first, between others and last: nothing is written for them, and their neighbours'
    tokens are their neighbours' own."""
    check_attention(device, case)


class BadLatentCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: LatentCase
    bad: tuple[int, ...]
    fill: Fill = "nan"


@kind(
    "latent.bad_rows",
    corpus=[
        BadLatentCase(call=LatentCase(rows=DECODE), bad=EDGES),
        BadLatentCase(call=LatentCase(rows=MIXED, rope=True, pad_tokens=2), bad=LAST, fill="mixed"),
        BadLatentCase(call=LatentCase(rows=MIXED, window=4, dtype="narrow"), bad=EDGES, fill="one"),
    ],
    quick=2,
)
def bad_latent(device: Device, case: BadLatentCase) -> None:
    """A sequence of latent rows that are no numbers leaves every bit of the others."""
    call = resolved(case.call, device)
    check_others(device, lambda: latent_call(device, call), case.bad, case.fill)


@kind(
    "latent.empty_rows",
    corpus=[
        LatentCase(rows=rows(NONE, (1, 1, 1), NONE, (0, 3, 1), NONE)),
        LatentCase(rows=rows(NONE, (0, 0, 9), NONE, (1, 2, 5)), pad_rows=1, pad_tokens=1),
    ],
)
def empty_latent(device: Device, case: LatentCase) -> None:
    """Rows without a token stand first, between others and last."""
    device.limit("a padded row has a token", device.capabilities.padding == "zero_rows")
    LatentCall.make(device, case).check()


class BadStateCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: RecurrenceCase
    bad: tuple[int, ...]
    fill: Fill = "nan"


STATES = (StateRow(5, 1), StateRow(1, 1), StateRow(40, 1), StateRow(0, 1))
CHUNKS = (StateRow(3, 7), StateRow(0, 33), StateRow(9, 1), StateRow(4, 2))


@kind(
    "state.bad_rows",
    corpus=[
        BadStateCase(call=RecurrenceCase(recurrence=name, rows=shape), bad=bad, fill=fill)  # type: ignore[arg-type]
        for name in RECURRENCES
        for shape, bad, fill in ((STATES, EDGES, "nan"), (CHUNKS, LAST, "mixed"))
    ],
    quick=4,
)
def bad_states(device: Device, case: BadStateCase) -> None:
    """A sequence that takes in what is no number leaves every bit of the other sequences' outputs and states."""
    call = resolved(case.call, device)
    check_others(device, lambda: state_call(device, call), case.bad, case.fill)


@kind(
    "state.empty_rows",
    corpus=[
        RecurrenceCase(recurrence=name, rows=(StateRow(4, 0), StateRow(5, 1), StateRow(7, 0), StateRow(2, 3)))
        for name in RECURRENCES
    ],
    quick=2,
)
def empty_states(device: Device, case: RecurrenceCase) -> None:
    """A sequence without a token in the step keeps its state, first and between others."""
    device.limit("a padded row has a token", device.capabilities.padding == "zero_rows")
    call = RecurrenceCall.make(device, case)
    before = call.held()
    found = call.run()
    after, at = call.held(), 0
    for index, row in enumerate(case.rows):
        mine, at = slice(at, at + row.query), at + row.query
        if row.query == 0:
            block = call.blocks[index]
            device.same_bits(f"state of row {index}, which has no token", after[block], before[block])
            continue
        output, last = call.expected(mine, call.states[index])
        device.compare(f"output of row {index}", found[mine], output)
        device.compare(f"state of row {index}", after[call.blocks[index]], last)


class BadEncoderCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: EncoderCase
    bad: tuple[int, ...]
    fill: Fill = "nan"


@kind(
    "encoder.bad_rows",
    corpus=[
        BadEncoderCase(call=EncoderCase(lengths=(5, 17, 1, 40, 3)), bad=(0, 3)),
        BadEncoderCase(call=EncoderCase(lengths=(5, 17, 1, 40, 3), window=4, reach=3), bad=(1, 4), fill="mixed"),
        BadEncoderCase(call=EncoderCase(lengths=(70, 9, 64), dtype="narrow", head_dim=64), bad=(1,), fill="one"),
    ],
    quick=2,
)
def bad_encoder(device: Device, case: BadEncoderCase) -> None:
    """A text of what is no number leaves every bit of the texts beside it."""
    call = resolved(case.call, device)
    check_others(device, lambda: encoder_call(device, call), case.bad, case.fill)
