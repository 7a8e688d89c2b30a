"""Sampling as docs/reference/randomness.md specifies it: the token that the draw names, and none other."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import strategies as st
from torch import Tensor

from anychip_conformance.case import kind
from anychip_conformance.device import Device, seen
from anychip_conformance.oracle import vectorised as oracle
from anychip_conformance.oracle.rounding import U32, gamma


class SampleCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Each list has an entry by row, or one for all. `exact`: eight tokens of equal probability, thresholds that
    their sums hit, and no rounding that excuses another token."""

    rows: int = 4
    vocab: int = 50
    temperature: tuple[float, ...] = (1.0,)
    top_k: tuple[int, ...] = (0,)
    top_p: tuple[float, ...] = (1.0,)
    min_p: tuple[float, ...] = (0.0,)
    exact: bool = False
    edges: bool = False
    """Only ids around those where something changes, and the last ones, are likely."""
    spread: float = 2.0
    num_top: int = 20
    """Of log-probabilities: how many ids are asked for."""
    position: int = 500
    """Of the first row's second draw; its first has 11."""
    seed: int = 0

    def of_row(self, values: tuple[float, ...], row: int) -> float:
        return values[row % len(values)]


_EQUAL_TOKENS = 8
_EDGES = (127, 128, 255, 256, 4095, 4096, 32_767, 32_768, 65_535, 65_536, 131_071, 131_072)


def edge_ids(vocab: int) -> list[int]:
    """Eight of them: the last three, and the largest edges before."""
    return [*[edge for edge in (0, 1, 2, 3, 5, *_EDGES) if edge < vocab - 3][-5:], vocab - 3, vocab - 2, vocab - 1]


def logits_of(device: Device, case: SampleCase) -> Tensor:
    rng = np.random.default_rng(case.seed)
    if case.exact:
        # Eight equal tokens and nothing else: their probabilities and sums are exact in every format.
        flat = np.full((case.rows, case.vocab), -np.inf)
        for row in flat:
            row[edge_ids(case.vocab) if case.edges else rng.choice(case.vocab, _EQUAL_TOKENS, replace=False)] = 0.0
        return device.tensor(flat, "float32")
    if case.edges:
        ragged = 0.1 * rng.normal(size=(case.rows, case.vocab))
        for row, values in enumerate(ragged):
            values[edge_ids(case.vocab)[(row + case.seed - 1) % _EQUAL_TOKENS]] = 9.0
        return device.tensor(ragged, "float32")
    return device.tensor(case.spread * rng.normal(size=(case.rows, case.vocab)), "float32")


def seed_of(case: SampleCase, row: int) -> int:
    """64 bits, of which both halves differ between rows."""
    return (case.seed * 7919 + 104729 * row + (row << 40)) & (2**64 - 1)


def arguments(device: Device, case: SampleCase, *, position: int = 11) -> dict[str, Tensor]:
    rows = range(case.rows)
    seeds = [seed_of(case, row) for row in rows]
    halves = {
        "seed_low": [np.int32(np.uint32(seed & 0xFFFFFFFF)) for seed in seeds],
        "seed_high": [np.int32(np.uint32(seed >> 32)) for seed in seeds],
    }
    made = {name: device.tensor(np.asarray(values), "int32") for name, values in halves.items()}
    for name in ("temperature", "top_p", "min_p"):
        made[name] = device.tensor([case.of_row(getattr(case, name), row) for row in rows], "float32")
    made["top_k"] = device.tensor([case.of_row(case.top_k, row) for row in rows], "int32")
    made["sample_index"] = device.tensor([row % 3 for row in rows], "int32")
    made["position"] = device.tensor([position + row for row in rows], "int32")
    return made


def uniform_of(case: SampleCase, row: int, position: int = 11) -> float:
    return oracle.philox_uniform(seed_of(case, row), row % 3, position + row)


def judge(device: Device, case: SampleCase, ids: Tensor, logits: Tensor, position: int = 11) -> None:
    assert str(ids.dtype) == "torch.int32" and tuple(ids.shape) == (case.rows,), (
        f"ids are {ids.dtype} {tuple(ids.shape)}"
    )
    drawn, wide = seen(ids).astype(int), seen(logits)
    for row in range(case.rows):
        temperature = float(np.float32(case.of_row(case.temperature, row)))
        scores = wide[row] / temperature if temperature else wide[row]
        slack = 0.0 if case.exact else 2 * gamma(case.vocab + 8) + 8 * U32 * float(np.abs(scores).max())
        accepted = oracle.acceptable_tokens(
            wide[row],
            temperature=temperature,
            top_k=int(case.of_row(case.top_k, row)),
            top_p=float(np.float32(case.of_row(case.top_p, row))),
            min_p=float(np.float32(case.of_row(case.min_p, row))),
            uniform=uniform_of(case, row, position),
            slack=slack,
        )
        assert int(drawn[row]) in accepted, f"row {row}: drew {drawn[row]}, expected one of {sorted(accepted)}"


def check(device: Device, case: SampleCase) -> None:
    device.need("seeded_sampling", device.capabilities.seeded_sampling)
    logits = logits_of(device, case)
    before = logits.clone()
    for position in (11, case.position):
        ids = device.ops.ops.sample(logits=logits, all_greedy=False, **arguments(device, case, position=position))
        judge(device, case, ids, logits, position)
    device.same_bits("input logits", logits, before)


_drawn = st.builds(
    SampleCase,
    rows=st.sampled_from([1, 2, 7, 16]),
    vocab=st.sampled_from([2, 3, 31, 32, 33, 100, 512]),
    temperature=st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.0]), min_size=1, max_size=3).map(tuple),
    top_k=st.lists(st.sampled_from([0, 1, 2, 10, 1000]), min_size=1, max_size=3).map(tuple),
    top_p=st.lists(st.sampled_from([1.0, 0.9, 0.5, 0.01]), min_size=1, max_size=3).map(tuple),
    min_p=st.lists(st.sampled_from([0.0, 0.05, 0.5, 1.0]), min_size=1, max_size=3).map(tuple),
    spread=st.sampled_from([0.1, 2.0, 20.0]),
    seed=st.integers(0, 2**16),
)


@kind("sample.greedy", corpus=[SampleCase(temperature=(0.0,)), SampleCase(temperature=(0.0,), vocab=1000, rows=16)])
def greedy(device: Device, case: SampleCase) -> None:
    """Temperature 0 takes the largest logit, with the promise that all rows do, and without."""
    logits = logits_of(device, case)
    for promise in (False, True):
        ids = device.ops.ops.sample(logits=logits, all_greedy=promise, **arguments(device, case))
        judge(device, case, ids, logits)


@kind(
    "sample.draw",
    corpus=[
        SampleCase(rows=16),
        SampleCase(rows=16, temperature=(0.5, 0.0, 2.0)),
        SampleCase(rows=32, vocab=1000, spread=1.0),
    ],
    drawn=_drawn,
    examples=100,
)
def draw(device: Device, case: SampleCase) -> None:
    """The inverse of the cumulative distribution at Philox's number, by each row's own seed, index and position."""
    check(device, case)


@kind(
    "sample.truncation",
    corpus=[
        SampleCase(rows=16, top_k=(1, 3, 10)),
        SampleCase(rows=16, top_p=(0.3, 0.9), spread=1.0),
        SampleCase(rows=16, min_p=(0.1, 0.5), spread=1.0),
        SampleCase(rows=32, top_k=(5, 0), top_p=(0.7,), min_p=(0.0, 0.2), temperature=(1.0, 1.5)),
    ],
    quick=4,
)
def truncation(device: Device, case: SampleCase) -> None:
    """top-k, then top-p of what it kept, then min-p relative to the best."""
    check(device, case)


@kind(
    "sample.ties",
    corpus=[
        SampleCase(rows=64, exact=True, top_p=(0.25, 0.5, 0.75)),
        SampleCase(rows=64, exact=True, min_p=(1.0, 0.5)),
        SampleCase(rows=64, exact=True, top_k=(1, 3, 7)),
    ],
    quick=3,
)
def ties(device: Device, case: SampleCase) -> None:
    """Thresholds that a sum reaches exactly: not a token more, not one less. Equal tokens rank by id."""
    check(device, case)


@kind("sample.cotenants", corpus=[SampleCase(rows=12, temperature=(1.0, 0.7), top_p=(0.9, 1.0))])
def cotenants(device: Device, case: SampleCase) -> None:
    """A row draws the same token whoever shares the batch, and wherever it stands in it."""
    logits, given = logits_of(device, case), arguments(device, case)
    whole = device.ops.ops.sample(logits=logits, all_greedy=False, **given)
    for rows in ([3], [11, 0, 5]):
        part = {name: value[rows].contiguous() for name, value in given.items()}
        alone = device.ops.ops.sample(logits=logits[rows].contiguous(), all_greedy=False, **part)
        device.same_bits(f"tokens of rows {rows}", alone, whole[rows].contiguous())


@kind("sample.distinct", corpus=[SampleCase(rows=32, vocab=1000, spread=0.01)])
def distinct(device: Device, case: SampleCase) -> None:
    """Rows with seeds, indexes and positions of their own draw tokens of their own, over nearly equal logits."""
    device.need("seeded_sampling", device.capabilities.seeded_sampling)
    flat = device.tensor(np.zeros((case.rows, case.vocab)), "float32")
    ids = seen(device.ops.ops.sample(logits=flat, all_greedy=False, **arguments(device, case)))
    assert len(set(ids.tolist())) > case.rows // 2, f"{len(set(ids.tolist()))} different tokens in {case.rows} rows"


@kind(
    "sample.logprobs",
    corpus=[SampleCase(rows=5, vocab=40), SampleCase(rows=3, vocab=10), SampleCase(rows=4, vocab=2000, spread=6.0)],
    drawn=_drawn,
)
def logprobs(device: Device, case: SampleCase) -> None:
    """The chosen token's log-probability, and the likeliest ids in falling order with theirs."""
    logits = logits_of(device, case)
    rng = np.random.default_rng(case.seed)
    chosen = rng.integers(0, case.vocab, case.rows)
    if case.edges:
        chosen[0] = case.vocab - 1
    num_top = min(case.num_top, case.vocab)
    got, top_ids, top = device.ops.ops.logprobs(
        logits=logits, token_ids=device.tensor(chosen, "int32"), num_top=num_top
    )
    expected = oracle.log_softmax(seen(logits))

    def at(ids: np.ndarray) -> oracle.Bounded:
        return oracle.Bounded(np.take_along_axis(expected.value, ids, -1), np.take_along_axis(expected.bound, ids, -1))

    column = at(chosen[:, None])
    device.compare(
        "the chosen token's", got, oracle.Bounded(column.value[:, 0], column.bound[:, 0]), label="logprobs/float32"
    )
    ids = seen(top_ids).astype(int)
    device.compare("the likeliest tokens'", top, at(ids), label="logprobs/float32")
    ranked = -np.sort(-expected.value, axis=-1)[:, :num_top]
    bound = np.broadcast_to(expected.bound.max(-1, keepdims=True), ranked.shape)
    device.compare("the likeliest, in order", top, oracle.Bounded(ranked, bound))
    assert all(len(set(row)) == num_top for row in ids.tolist()), "a likeliest token is listed twice"
