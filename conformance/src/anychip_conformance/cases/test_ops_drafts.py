"""The op that says which drawn tokens are kept where tokens were drafted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from hypothesis import strategies as st

from anychip_conformance.case import kind
from anychip_conformance.device import Device
from anychip_conformance.oracle.vectorised import Bounded

Row = list[tuple[int, int]]
"""By sample: the token drawn, and the one drafted behind it, -1 at the last."""

_ID_BITS = 18
"""2**18 is about the largest vocabulary that models have."""

_KNOWN_ROWS: Sequence[Row] = (
    # The second draft misses. Those behind it are right, the first of them the id that was drawn at the miss.
    [(7, 7), (8, 9), (8, 8), (5, 5), (6, -1)],
    # Every draft is right, behind a row that has missed.
    [(4, 4), (9, 9), (2, -1)],
    # Ids that differ in their highest bit, and in their lowest.
    [(2**16 + 7, 7), (7, -1)],
    [(2**17 + 1, 2**17), (2**17, -1)],
)
"""Rows that no case leaves to its seed."""


class AcceptCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Rows of at least so many drawn tokens together, and samples of padding behind them."""

    tokens: int = 5
    padding: int = 1
    seed: int = 0


def random_row(rng: np.random.Generator) -> Row:
    """A wrong draft differs in one bit, or is what another sample of the row draws."""
    drawn_ids = rng.integers(0, 2**_ID_BITS, int(rng.integers(1, 6))).tolist()
    row = []
    for drawn_id in drawn_ids[:-1]:
        wrong = [drawn_id ^ (1 << int(rng.integers(0, _ID_BITS))), *(id for id in drawn_ids if id != drawn_id)]
        row.append((drawn_id, drawn_id if rng.random() < 0.7 else wrong[int(rng.integers(0, len(wrong)))]))
    return [*row, (drawn_ids[-1], -1)]


def random_rows(case: AcceptCase) -> list[Row]:
    rng, rows = np.random.default_rng(case.seed), list[Row]()
    while sum(map(len, rows)) < case.tokens:
        rows.append(random_row(rng))
    return rows


def check_kept(device: Device, rows: Sequence[Row], padding: int) -> None:
    samples: list[tuple[int, int, int, bool]] = []
    for row in rows:
        first, keeps = len(samples), True
        for drawn_id, draft_id in row:
            samples.append((drawn_id, draft_id, first, keeps))
            keeps = keeps and draft_id == drawn_id
    ids, draft_ids, first_samples, kept = (np.array(column) for column in zip(*samples, strict=True))
    result = device.ops.ops.accept_drafts(
        ids=device.tensor(np.pad(ids, (0, padding), constant_values=7), "int32"),
        draft_ids=device.tensor(np.pad(draft_ids, (0, padding), constant_values=-1), "int32"),
        first_samples=device.tensor(np.pad(first_samples, (0, padding)), "int32"),
    )
    expected = kept.astype(np.float64)  # what is kept of padding is nobody's
    device.compare("kept samples", result[: len(kept)].int(), Bounded(expected, np.zeros_like(expected)))


@kind(
    "op.accept_drafts",
    corpus=[AcceptCase(tokens=tokens) for tokens in (1, 6, 40)],
    drawn=st.builds(
        AcceptCase,
        tokens=st.sampled_from([1, 2, 3, 7, 16, 33]),
        padding=st.integers(0, 2),
        seed=st.integers(0, 2**16),
    ),
)
def accept_drafts(device: Device, case: AcceptCase) -> None:
    """A row keeps its samples up to the first that drew another token than its draft, which is kept too; what a later
    one drew, and what other rows drew, plays no part. Ids are other ones where one bit differs, and where another
    sample of the row drew them."""
    check_kept(device, _KNOWN_ROWS, case.padding)
    check_kept(device, random_rows(case), case.padding)
