"""Latent attention, state layers and encoders at the sizes of real models (reach.REACH)."""

from __future__ import annotations

from anychip.plugin_api import RECURRENCES
from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.cases import test_encoder, test_latent, test_recurrences, test_states
from anychip_conformance.cases.test_encoder import EncoderCase
from anychip_conformance.device import Device
from anychip_conformance.latent_calls import LatentCase
from anychip_conformance.recurrence_calls import RecurrenceCase
from anychip_conformance.state_calls import StateCase, StateRow
from anychip_conformance.visits import Visit, VisitCase, Visits

_DEADLINE_S = 240.0
_CONTEXTS = (129, 1025, 4097, 32_769, 65_537, 131_072)


def _latent(*rows: tuple[int, int, int], **more: object) -> LatentCase:
    sizes = {"num_heads": 1, "latent_dim": 16, "rope_dim": 16, "nope_dim": 8, "v_dim": 8}
    return LatentCase(rows=tuple(Row(*row) for row in rows), **{**sizes, **more})  # type: ignore[arg-type]


LATENT = Visits(
    (
        Visit(test_latent.attend, "context", lambda n: _latent((0, n - 1, 1), needles=True), sizes=_CONTEXTS),
        Visit(
            test_latent.attend,
            "context",
            lambda n: _latent((0, n - 3, 3), (0, 4, 1), needles=True, num_heads=2, dtype="narrow"),
            sizes=(1025, 4097, 32_769),
            variant="of a chunk",
        ),
        Visit(
            test_latent.attend, "rows", lambda n: _latent(*[(0, row % 4, 1) for row in range(n)]), most=513, least=63
        ),
        Visit(test_latent.attend, "chunk", lambda n: _latent((0, 0, n), (0, 3, 1)), most=1025),
        Visit(test_latent.attend, "heads", lambda n: _latent((0, 9, 2), (0, 2, 1), num_heads=n)),
        Visit(
            test_latent.attend,
            "latent_dim",
            lambda n: _latent((0, 30, 3), (1, 2, 1), latent_dim=n, rope_dim=64, nope_dim=128, v_dim=128, num_heads=2),
        ),
        Visit(
            test_latent.attend,
            "positions",
            lambda n: _latent((0, n, 1), rope=True, window=9),
            sizes=(4097, 32_769, 65_537),
        ),
    )
)


@kind("latent.reach", corpus=LATENT.corpus, quick=0, deadline_s=_DEADLINE_S)
def latent(device: Device, case: VisitCase) -> None:
    """Latent attention over long contexts, in many rows, with 128 heads over rows of 512 numbers."""
    LATENT.check(device, case)


def _short(count: int) -> tuple[StateRow, ...]:
    return tuple(StateRow(row % 3, 1 + row % 2) for row in range(count))


STATES = Visits(
    (
        Visit(test_states.advance, "rows", lambda n: StateCase(rows=_short(n), width=4)),
        Visit(test_states.advance, "chunk", lambda n: StateCase(rows=(StateRow(3, n), StateRow(0, 2)), width=4)),
        Visit(test_states.advance, "width", lambda n: StateCase(rows=_short(4), width=n)),
        *[
            Visit(
                test_recurrences.recurrence,
                "rows",
                lambda n, name=name: RecurrenceCase(recurrence=name, rows=_short(n)),  # type: ignore[misc]
                sizes=(65, 129),
                variant=name,
            )
            for name in RECURRENCES
        ],
        *[
            Visit(
                test_recurrences.recurrence,
                "chunk",
                lambda n, name=name: RecurrenceCase(recurrence=name, rows=(StateRow(2, n), StateRow(0, 1))),  # type: ignore[misc]
                sizes=(257, 513),
                variant=name,
            )
            for name in RECURRENCES
        ],
    )
)


@kind("state.reach", corpus=STATES.corpus, quick=0, deadline_s=_DEADLINE_S)
def state(device: Device, case: VisitCase) -> None:
    """Many sequences in a step, and long chunks of one, in every recurrence."""
    STATES.check(device, case)


ENCODERS = Visits(
    (
        Visit(
            test_encoder.attend,
            "sequence",
            lambda n: EncoderCase(lengths=(n, 2), num_heads=1, num_kv_heads=1, head_dim=16),
        ),
        Visit(
            test_encoder.attend,
            "sequence",
            lambda n: EncoderCase(lengths=(2, n), num_heads=1, num_kv_heads=1, head_dim=16, window=300, reach=200),
            sizes=(513, 1025),
            variant="within a window",
        ),
        Visit(
            test_encoder.attend,
            "rows",
            lambda n: EncoderCase(
                lengths=tuple(1 + row % 3 for row in range(n)), num_heads=2, num_kv_heads=2, head_dim=16
            ),
        ),
        Visit(
            test_encoder.attend,
            "heads",
            lambda n: EncoderCase(lengths=(3, 4), num_heads=n, num_kv_heads=n, head_dim=16),
        ),
    )
)


@kind("encoder.reach", corpus=ENCODERS.corpus, quick=0, deadline_s=_DEADLINE_S)
def encoder(device: Device, case: VisitCase) -> None:
    """Long sequences, many of them in a step, and many heads."""
    ENCODERS.check(device, case)
