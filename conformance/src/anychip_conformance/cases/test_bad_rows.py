"""One bad row: NaN, infinities, nothing that may be chosen. Its own result may be anything; the rows beside it keep
every bit, ids stay in range, and nothing faults. Ops, products, experts and draws."""

from __future__ import annotations

import msgspec
import numpy as np

from anychip_conformance.bad_values import Fill, check_others, fill_row, in_range
from anychip_conformance.case import kind
from anychip_conformance.cases import test_moe, test_sampling
from anychip_conformance.cases.test_linear import LinearCase
from anychip_conformance.cases.test_moe import MOE_SCHEMES, MoECase
from anychip_conformance.cases.test_sampling import SampleCase
from anychip_conformance.choices import CaseDtype, resolved
from anychip_conformance.device import Device, seen
from anychip_conformance.oracle.vectorised import Bounded
from anychip_conformance.products import FORMATS, SCHEMES
from anychip_conformance.row_calls import OP_CALLS, OpCalls, OpSizes
from anychip_conformance.row_calls_products import draw_call, experts_call, linear_call, routing_call

FILLS: tuple[Fill, ...] = ("nan", "one", "mixed", "inf", "-inf")


class BadOpCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: str
    rows: int = 9
    width: int = 64
    bad: tuple[int, ...] = (0, 4, 8)
    fill: Fill = "nan"
    dtype: CaseDtype = "any"


@kind(
    "op.bad_rows",
    corpus=[
        case
        for call in OP_CALLS
        for case in (
            BadOpCase(call=call),
            BadOpCase(call=call, rows=33, width=100, bad=(1, 16, 31), fill="mixed", dtype="narrow"),
        )
    ],
    quick=4,
)
def bad_rows(device: Device, case: BadOpCase) -> None:
    """Rows of NaN, infinities and the largest numbers change no bit of the rows beside them, and ids stay in range."""
    device.need_dtype(case.dtype)
    sizes = OpSizes(rows=case.rows, width=case.width, dtype=case.dtype)
    check_others(device, lambda: OpCalls(device, sizes).make(case.call), case.bad, case.fill)


@kind("op.bad_table", corpus=[BadOpCase(call="embedding", dtype=dtype) for dtype in ("any", "narrow")])  # type: ignore[arg-type]
def bad_table(device: Device, case: BadOpCase) -> None:
    """An id that a share of the embedding table does not hold gives zeros, also where the share holds no numbers."""
    device.need_dtype(case.dtype)
    weight = device.tensor(np.full((case.rows, case.width), np.nan), case.dtype)
    ids = np.array([0, case.rows - 1, 2 * case.rows, 10 * case.rows])
    result = device.ops.ops.embedding(ids=device.tensor(ids, "int32"), weight=weight, first=case.rows)
    zeros = np.zeros((len(ids), case.width))
    device.compare("rows that others hold", result, Bounded(zeros, zeros))


@kind("op.bad_masked", corpus=[BadOpCase(call="apply_token_masks", fill=fill) for fill in FILLS], quick=2)
def bad_masked(device: Device, case: BadOpCase) -> None:
    """A masked token is minus infinity, whatever its logit was: NaN and infinity among them."""
    values = np.random.default_rng(1).normal(size=(case.rows, case.width))
    logits = device.tensor(values, "float32")
    for row in case.bad:
        fill_row(logits[row : row + 1], case.fill)
    even = np.full((case.rows, -(-case.width // 32)), 0x55555555, dtype=np.int64)
    result = device.ops.ops.apply_token_masks(logits=logits.clone(), masks=device.tensor(even, "int32"))
    forbidden = seen(result)[:, 1::2]
    assert (forbidden == -np.inf).all(), f"a forbidden token's logit is {forbidden[forbidden != -np.inf][0]}"
    device.same_bits("logits of allowed tokens", result[:, ::2].contiguous(), logits[:, ::2].contiguous())


class BadLinearCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: LinearCase
    bad: tuple[int, ...]
    fill: Fill = "nan"


_FEW, _MANY = ((9, (0, 4, 8)), (33, (1, 16, 32)))


@kind(
    "linear.bad_rows",
    corpus=[
        BadLinearCase(call=LinearCase(tokens=tokens, columns=96, rows=(64, 32), dtype=dtype, epilogue=epilogue),  # type: ignore[arg-type]
                      bad=bad, fill=fill)
        for (tokens, bad), fill in ((_FEW, "nan"), (_MANY, "mixed"))
        for dtype, epilogue in (("any", None), ("narrow", None), ("narrow", "silu"))
    ],
    quick=4,
)  # fmt: skip
def bad_linear(device: Device, case: BadLinearCase) -> None:
    """A product's other rows keep every bit beside rows that are no numbers."""
    call = resolved(case.call, device)
    check_others(device, lambda: linear_call(device, call), case.bad, case.fill)


@kind(
    "linear.bad_rows_quantized",
    profile="quantization",
    corpus=[
        BadLinearCase(call=LinearCase(tokens=tokens, columns=96, rows=(64, 32), scheme=scheme), bad=bad, fill=fill)  # type: ignore[arg-type]
        for scheme in (*SCHEMES, *FORMATS)
        for (tokens, bad), fill in ((_FEW, "nan"), (_MANY, "mixed"))
    ],
)
def bad_linear_quantized(device: Device, case: BadLinearCase) -> None:
    """So do those of a quantized product: a row's own activations have a scale of their own, which no NaN enters."""
    call = resolved(case.call, device)
    check_others(device, lambda: linear_call(device, call), case.bad, case.fill)


class BadMoECase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: MoECase
    bad: tuple[int, ...]
    fill: Fill = "nan"


_ROUTES = (
    MoECase(tokens=9, experts=60, top_k=8),
    MoECase(tokens=9, experts=8, top_k=3, scoring="sigmoid", router_bias=True),
    MoECase(tokens=9, experts=16, top_k=4, groups=4, top_groups=2),
    MoECase(tokens=9, experts=16, top_k=4, groups=4, top_groups=2, scoring="sigmoid", router_bias=True),
    MoECase(tokens=9, experts=128, top_k=8, renormalize=False, dtype="narrow"),
)


@kind(
    "moe.bad_router",
    corpus=[BadMoECase(call=call, bad=(0, 4, 8), fill=fill) for fill in FILLS for call in _ROUTES],
    quick=5,
)
def bad_router(device: Device, case: BadMoECase) -> None:
    """Of router logits that are no numbers come top_k different experts that exist; other rows' choices and weights
    keep every bit."""
    call = resolved(case.call, device)
    spoiled = check_others(device, lambda: routing_call(device, call), case.bad, case.fill)
    picked = np.sort(seen(spoiled.run(spoiled.inputs)["experts"]), axis=-1)
    twice = np.flatnonzero((np.diff(picked, axis=-1) == 0).any(axis=-1))
    assert not len(twice), f"row {twice[0]} picks an expert twice: {picked[twice[0]].astype(int).tolist()}"


@kind(
    "moe.bad_rows",
    corpus=[
        BadMoECase(call=call, bad=bad, fill=fill)  # type: ignore[arg-type]
        for (tokens, bad), fill in ((_FEW, "nan"), (_MANY, "mixed"))
        for call in (
            MoECase(tokens=tokens, experts=16, top_k=4),
            MoECase(tokens=tokens, shared=True, crowded=True, dtype="narrow"),
            MoECase(tokens=tokens, away=3, bias=True),
        )
    ],
    quick=3,
)
def bad_experts(device: Device, case: BadMoECase) -> None:
    """Tokens that share an expert with one that is no number keep every bit."""
    call = resolved(case.call, device)
    check_others(device, lambda: experts_call(device, call), case.bad, case.fill)


@kind(
    "moe.bad_rows_quantized",
    profile="quantization",
    corpus=[
        BadMoECase(call=MoECase(tokens=9, scheme=scheme, dtype="narrow"), bad=(0, 4, 8), fill="mixed")
        for scheme in MOE_SCHEMES
    ],
)
def bad_experts_quantized(device: Device, case: BadMoECase) -> None:
    """So do those of quantized experts."""
    call = resolved(case.call, device)
    check_others(device, lambda: experts_call(device, call), case.bad, case.fill)


@kind(
    "moe.bad_routed",
    corpus=[
        BadMoECase(call=call, bad=(0, 4, 8), fill=fill)
        for fill in ("nan", "-inf")
        for call in (MoECase(tokens=9, experts=12, top_k=4), MoECase(tokens=9, away=3, shared=True, dtype="narrow"))
    ],  # type: ignore[arg-type]
    quick=2,
)
def bad_routed(device: Device, case: BadMoECase) -> None:
    """Beside tokens that go to no expert in particular, the others get what their own experts give."""
    call = resolved(case.call, device)
    loaded = test_moe.Loaded(device, call)
    x, logits, bias = loaded.inputs()
    shared = x.flip(0).contiguous() if call.shared else None
    given = {"router_bias": bias, "shared": shared, "expert_map": loaded.expert_map}
    clean, spoiled = loaded.kernel.apply(x, logits, loaded.packed, **given).clone(), logits.clone()
    for row in case.bad:
        fill_row(spoiled[row : row + 1], case.fill)
    result = loaded.kernel.apply(x, spoiled, loaded.packed, **given).clone()
    result[list(case.bad)] = clean[list(case.bad)]
    loaded.judge(x, logits, bias, shared, result)


class BadSampleCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    call: SampleCase
    bad: tuple[int, ...] = (0, 4, 8)
    fill: Fill = "nan"
    greedy: bool = False


_DRAWS = (
    (SampleCase(rows=9, temperature=(0.0,)), True),
    (SampleCase(rows=9, vocab=5000, temperature=(0.0,)), False),
    (SampleCase(rows=9, temperature=(1.0, 0.0, 0.7)), False),
    (SampleCase(rows=9, vocab=300, top_k=(5, 0), top_p=(0.8,), min_p=(0.0, 0.1)), False),
    (SampleCase(rows=9, vocab=300, top_p=(0.9, 0.3)), False),
)


@kind(
    "sample.bad_rows",
    corpus=[BadSampleCase(call=call, fill=fill, greedy=greedy) for fill in FILLS for call, greedy in _DRAWS],
    quick=5,
)
def bad_draws(device: Device, case: BadSampleCase) -> None:
    """A row of NaN, of infinities or with nothing left to draw gives an id of the vocabulary, greedily and drawn; the
    rows beside it draw what they always do."""
    check_others(device, lambda: draw_call(device, case.call, all_greedy=case.greedy), case.bad, case.fill)


@kind("sample.one_left", corpus=[SampleCase(rows=9, vocab=vocab) for vocab in (2, 50, 5000)], quick=2)
def one_left(device: Device, case: SampleCase) -> None:
    """Where a mask left one token, that is drawn: at any temperature and behind every cut, beside rows that have
    none left."""
    rng = np.random.default_rng(3)
    left = rng.integers(0, case.vocab, case.rows)
    left[0], left[1] = 0, case.vocab - 1
    flat = np.full((case.rows, case.vocab), -np.inf)
    flat[np.arange(case.rows), left] = rng.normal(size=case.rows)
    flat[2] = -np.inf
    for changes in ({}, {"temperature": (0.0, 2.0)}, {"top_k": (1,)}, {"top_p": (0.01,)}, {"min_p": (1.0,)}):
        given = test_sampling.arguments(device, msgspec.structs.replace(case, **changes))
        ids = device.ops.ops.sample(logits=device.tensor(flat, "float32"), all_greedy=False, **given)
        in_range("ids", ids, case.vocab)
        wrong = [row for row in range(case.rows) if row != 2 and int(ids[row]) != left[row]]
        assert not wrong, f"row {wrong[0]} drew {int(ids[wrong[0]])}, where only {left[wrong[0]]} is left"


@kind("op.bad_adapter", corpus=[BadOpCase(call="add_low_rank", dtype=dtype) for dtype in ("any", "narrow")])  # type: ignore[arg-type]
def bad_adapter(device: Device, case: BadOpCase) -> None:
    """An adapter that is no number, in one slot, leaves every bit of the tokens that have another one, or none."""
    device.need("lora", device.capabilities.lora)
    device.need_dtype(case.dtype)
    sizes = OpSizes(rows=case.rows, width=case.width, dtype=case.dtype)
    clean, spoiled = OpCalls(device, sizes).low_rank(None), OpCalls(device, sizes).low_rank(1)
    expected, found = clean.run(clean.inputs)["sum"], spoiled.run(spoiled.inputs)["sum"]
    # Slots come in turns behind a token without any: the third has slot 1.
    others = [row for row in range(case.rows) if row % 4 != BAD_PLACE]
    device.same_bits("tokens of other slots", found[others].contiguous(), expected[others].contiguous())


BAD_PLACE = 2
