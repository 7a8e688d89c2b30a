"""Time: results that are read later, inputs that are overwritten behind a call, and the many calls of one object."""

from __future__ import annotations

import msgspec

from anychip.plugin_api import RECURRENCES
from anychip_conformance.attention_cases import rows
from anychip_conformance.case import kind
from anychip_conformance.cases import test_linear, test_moe
from anychip_conformance.cases.test_encoder import EncoderCase
from anychip_conformance.cases.test_linear import LinearCase
from anychip_conformance.cases.test_moe import MoECase
from anychip_conformance.cases.test_sampling import SampleCase
from anychip_conformance.choices import CaseDtype, each_dtype
from anychip_conformance.device import Device
from anychip_conformance.kept_results import check_kept, check_many
from anychip_conformance.latent_calls import LatentCase
from anychip_conformance.paged import AttentionCase, Call
from anychip_conformance.paged_judge import judge_output
from anychip_conformance.products import FORMATS, SCHEMES
from anychip_conformance.recurrence_calls import RecurrenceCase
from anychip_conformance.row_calls import OP_CALLS, Maker, OpCalls, OpSizes
from anychip_conformance.row_calls_caches import encoder_call, latent_call, paged_call, state_call
from anychip_conformance.row_calls_products import draw_call, experts_call, linear_call, routing_call
from anychip_conformance.state_calls import StateRow

DECODE = rows((1, 1, 1), (0, 3, 1), (1, 0, 1))
MIXED = rows((0, 0, 9), (1, 2, 1), (0, 5, 4))
FEW = 3
"""Rows of the step that comes back."""
BLOCKS = 20
"""Of the pool, whatever the step."""
STATES = (StateRow(5, 1), StateRow(0, 9), StateRow(4, 2))


class TimedOpCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: str
    rows: int = 9
    width: int = 64
    dtype: CaseDtype = "any"


def _op(device: Device, case: TimedOpCase) -> Maker:
    device.need_dtype(case.dtype)
    return lambda: OpCalls(device, OpSizes(rows=case.rows, width=case.width, dtype=case.dtype)).make(case.call)


_OPS = [
    TimedOpCase(call=call, rows=rows_, width=width, dtype=dtype)  # type: ignore[arg-type]
    for call in OP_CALLS
    for rows_, width, dtype in ((9, 64, "any"), (2, 256, "narrow"))
]


@kind("op.kept_results", corpus=_OPS, quick=4)
def kept_ops(device: Device, case: TimedOpCase) -> None:
    """A result is the caller's: no later call changes it, and neither does who overwrites what the op was given."""
    check_kept(device, _op(device, case))


@kind("op.many_calls", corpus=[case for case in _OPS if case.dtype == "any"], quick=2)
def many_ops(device: Device, case: TimedOpCase) -> None:
    """The n-th call gives what the first gave, also between calls of other values."""
    check_many(device, _op(device, case))


_LINEAR = [
    LinearCase(tokens=9, columns=96, rows=(64, 32)),
    LinearCase(tokens=1, columns=96, rows=(64,), dtype="narrow", bias=True),
    LinearCase(tokens=33, columns=64, rows=(32, 32), dtype="narrow", epilogue="silu"),
]
_QUANTIZED = [LinearCase(tokens=9, columns=96, rows=(64,), scheme=scheme) for scheme in (*SCHEMES, *FORMATS)]


@kind("linear.kept_results", corpus=_LINEAR)
def kept_linear(device: Device, case: LinearCase) -> None:
    """A product is the caller's: it stays when its activations are overwritten and the kernel is called again."""
    check_kept(device, lambda: linear_call(device, case))


@kind("linear.kept_results_quantized", profile="quantization", corpus=_QUANTIZED)
def kept_linear_quantized(device: Device, case: LinearCase) -> None:
    """So is a quantized product, whose activations a kernel may have rounded into storage of its own."""
    check_kept(device, lambda: linear_call(device, case))


@kind("linear.many_calls", corpus=_LINEAR[:2])
def many_linear(device: Device, case: LinearCase) -> None:
    """The n-th product is as right as the first."""
    check_many(device, lambda: linear_call(device, case))


@kind("linear.turns", corpus=each_dtype(LinearCase(columns=96, rows=(64, 32))), quick=2)
def linear_turns(device: Device, case: LinearCase) -> None:
    """One kernel has steps of few rows and of many in turns: what it keeps of the larger does not show in the
    smaller."""
    loaded = test_linear.Loaded(device, case)
    given, results = {tokens: loaded.inputs(tokens) for tokens in (3, 33, 1, 150)}, []
    for tokens in (3, 33, 3, 1, 150, 3):
        result = loaded.kernel.apply(given[tokens], loaded.packed)
        loaded.judge(given[tokens], result)
        results += [result.clone()] if tokens == FEW else []
    for result in results[1:]:
        device.same_bits("the same rows after others", result, results[0])


_MOE = [MoECase(tokens=9), MoECase(tokens=2, dtype="narrow", shared=True), MoECase(tokens=33, experts=16, top_k=4)]


@kind("moe.kept_results", corpus=_MOE)
def kept_moe(device: Device, case: MoECase) -> None:
    """What experts gave is the caller's, and so are weights and ids of a routing."""
    check_kept(device, lambda: experts_call(device, case))
    check_kept(device, lambda: routing_call(device, case))


@kind("moe.many_calls", corpus=_MOE[:2], quick=1)
def many_moe(device: Device, case: MoECase) -> None:
    """The n-th call of experts is as right as the first."""
    check_many(device, lambda: experts_call(device, case))


@kind("moe.turns", corpus=each_dtype(MoECase(tokens=70)), quick=2)
def moe_turns(device: Device, case: MoECase) -> None:
    """One kernel has few tokens and many in turns: what it sorted for the larger does not show in the smaller."""
    loaded = test_moe.Loaded(device, case)
    x_of_all, logits_of_all, _ = loaded.inputs()
    results = []
    for tokens in (3, 40, 3, 1, 70, 3):
        x, logits = (values[:tokens].contiguous() for values in (x_of_all, logits_of_all))
        result = loaded.kernel.apply(x, logits, loaded.packed)
        loaded.judge(x, logits, None, None, result)
        results += [result.clone()] if tokens == FEW else []
    for result in results[1:]:
        device.same_bits("the same tokens after others", result, results[0])


_DRAWS = [
    SampleCase(rows=9, vocab=300, temperature=(1.0, 0.0, 0.7), top_p=(0.9,)),
    SampleCase(rows=9, vocab=5000, temperature=(0.0,)),
]


@kind("sample.kept_results", corpus=_DRAWS)
def kept_draws(device: Device, case: SampleCase) -> None:
    """Drawn ids are the caller's: a later step's draw does not change them."""
    check_kept(device, lambda: draw_call(device, case))


@kind("sample.many_calls", corpus=[_DRAWS[0], SampleCase(rows=5, vocab=300, temperature=(0.0,))])
def many_draws(device: Device, case: SampleCase) -> None:
    """The n-th draw of the same row is the first: nothing of a draw is left for the next."""
    check_many(device, lambda: draw_call(device, case))


_PAGED = [
    AttentionCase(rows=DECODE),
    AttentionCase(rows=MIXED, dtype="narrow", head_dim=64, rope="neox", qk_norm=True),
    AttentionCase(rows=MIXED, window=5, pad_tokens=2),
]


@kind("attn.kept_results", corpus=_PAGED)
def kept_attention(device: Device, case: AttentionCase) -> None:
    """An attention output is the caller's: it stays when q, k and v are overwritten, and when the layers behind it use
    the same backend."""
    check_kept(device, lambda: paged_call(device, case))


@kind("attn.many_calls", corpus=_PAGED[:2], quick=1)
def many_attention(device: Device, case: AttentionCase) -> None:
    """The n-th call of a backend is as right as the first."""
    check_many(device, lambda: paged_call(device, case))


@kind(
    "attn.turns",
    corpus=[
        AttentionCase(rows=DECODE, dtype=dtype, **settings)  # type: ignore[arg-type]
        for dtype, settings in (("any", {}), ("narrow", {"head_dim": 64}), ("any", {"rope": "neox"}))
    ],
    quick=1,
)
def attention_turns(device: Device, case: AttentionCase) -> None:
    """One backend has steps of other sizes in turns, each with a plan of its own: every one is right, and the first
    comes back to the bit."""
    shapes = (DECODE, MIXED, DECODE, rows((0, 0, 33)), rows((2, 3, 1)), DECODE)
    backend, outputs = Call.make(device, case, num_blocks=BLOCKS).backend, []
    for shape in shapes:
        call = Call.make(device, msgspec.structs.replace(case, rows=shape), num_blocks=BLOCKS)
        call.backend = backend
        result = call.run()
        judge_output(device, call, result)
        outputs += [result.clone()] if shape is DECODE else []
    for output in outputs[1:]:
        device.same_bits("the same step after others", output, outputs[0])


_LATENT = [LatentCase(rows=DECODE), LatentCase(rows=MIXED, rope=True, dtype="narrow")]


@kind("latent.kept_results", corpus=_LATENT)
def kept_latent(device: Device, case: LatentCase) -> None:
    """A latent layer's output is the caller's."""
    check_kept(device, lambda: latent_call(device, case))


@kind("latent.many_calls", corpus=_LATENT, quick=1)
def many_latent(device: Device, case: LatentCase) -> None:
    """The n-th call of a latent backend is as right as the first."""
    check_many(device, lambda: latent_call(device, case))


_STATES = [RecurrenceCase(recurrence=name, rows=STATES) for name in RECURRENCES]


@kind("state.kept_results", corpus=_STATES, quick=2)
def kept_states(device: Device, case: RecurrenceCase) -> None:
    """A state layer's output is the caller's, and so are the inputs it was given."""
    check_kept(device, lambda: state_call(device, case))


@kind("state.many_calls", corpus=_STATES, quick=1)
def many_states(device: Device, case: RecurrenceCase) -> None:
    """The n-th step from the same states is as right as the first."""
    check_many(device, lambda: state_call(device, case))


_ENCODERS = [EncoderCase(lengths=(5, 17, 1)), EncoderCase(lengths=(40, 3), window=4, reach=3, dtype="narrow")]


@kind("encoder.kept_results", corpus=_ENCODERS)
def kept_encoder(device: Device, case: EncoderCase) -> None:
    """An encoder layer's output is the caller's."""
    check_kept(device, lambda: encoder_call(device, case))


@kind("encoder.many_calls", corpus=_ENCODERS, quick=1)
def many_encoder(device: Device, case: EncoderCase) -> None:
    """The n-th call under one plan, as the layers of an encoder make them, is as right as the first."""
    check_many(device, lambda: encoder_call(device, case))
