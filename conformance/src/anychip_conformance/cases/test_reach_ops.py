"""Ops at the sizes of real models (reach.REACH): many rows, wide rows, large vocabularies, far positions."""

from __future__ import annotations

from anychip_conformance.case import kind
from anychip_conformance.cases import test_adapters, test_ops, test_ops_drafts, test_sampling
from anychip_conformance.cases.test_adapters import LowRankCase
from anychip_conformance.cases.test_ops import EmbeddingCase, OpCase, RotaryCase
from anychip_conformance.cases.test_ops_drafts import AcceptCase
from anychip_conformance.cases.test_sampling import SampleCase
from anychip_conformance.device import Device
from anychip_conformance.visits import Visit, VisitCase, Visits

_DEADLINE_S = 240.0
_SMALL = 8

ROWS = Visits(
    (
        Visit(test_ops.rms_norm, "elementwise rows", lambda n: OpCase(tokens=n, width=_SMALL)),
        Visit(test_ops.residual_norm, "elementwise rows", lambda n: OpCase(tokens=n, width=_SMALL)),
        Visit(test_ops.gated_activation, "elementwise rows", lambda n: OpCase(tokens=n, width=_SMALL, option="silu")),
        Visit(test_ops.gate_up_act, "elementwise rows", lambda n: OpCase(tokens=n, width=_SMALL, option="silu")),
        Visit(test_ops.softcap, "elementwise rows", lambda n: OpCase(tokens=n, width=_SMALL, option="5")),
        Visit(test_ops.embedding, "elementwise rows", lambda n: EmbeddingCase(tokens=n, width=_SMALL)),
        Visit(
            test_ops.rotary,
            "elementwise rows",
            lambda n: RotaryCase(tokens=n, heads=1, head_dim=_SMALL, rotary_dim=4, furthest=400),
        ),
        Visit(
            test_ops.qkv_norm_rope,
            "elementwise rows",
            lambda n: RotaryCase(tokens=n, heads=1, head_dim=_SMALL, rotary_dim=4, furthest=400, qk_norm=True),
            most=4097,
        ),
        Visit(test_ops.matmul_reduce, "tokens", lambda n: OpCase(tokens=n, width=16)),
        Visit(test_ops.token_masks, "rows", lambda n: OpCase(tokens=n, width=33)),
        Visit(test_ops.edit_logits, "rows", lambda n: OpCase(tokens=n, width=33)),
        Visit(test_ops.count_tokens, "rows", lambda n: OpCase(tokens=n, width=33)),
        Visit(test_ops_drafts.accept_drafts, "rows", lambda n: AcceptCase(tokens=n)),
        Visit(test_adapters.low_rank, "tokens", lambda n: LowRankCase(tokens=n, columns=8, rows=(8,)), most=4097),
    )
)


@kind("op.reach_rows", corpus=ROWS.corpus, quick=2, deadline_s=_DEADLINE_S)
def rows(device: Device, case: VisitCase) -> None:
    """Every op over many rows: the last one is as right as the first."""
    ROWS.check(device, case)


WIDTHS = Visits(
    (
        Visit(test_ops.rms_norm, "hidden", lambda n: OpCase(tokens=2, width=n, needles=True)),
        Visit(
            test_ops.rms_norm,
            "hidden",
            lambda n: OpCase(tokens=2, width=n, dtype="narrow", needles=True),
            variant="narrow",
        ),
        Visit(test_ops.residual_norm, "hidden", lambda n: OpCase(tokens=2, width=n, needles=True)),
        Visit(test_ops.embedding, "hidden", lambda n: EmbeddingCase(tokens=3, width=n)),
        Visit(test_ops.gated_activation, "intermediate", lambda n: OpCase(tokens=2, width=n, option="silu")),
        Visit(test_ops.gate_up_act, "intermediate", lambda n: OpCase(tokens=2, width=n, option="swiglu_clamped")),
        Visit(test_ops.matmul_reduce, "columns", lambda n: OpCase(tokens=2, width=n, needles=True)),
        Visit(test_ops.rotary, "heads", lambda n: RotaryCase(tokens=2, heads=n)),
        Visit(test_ops.qkv_norm_rope, "heads", lambda n: RotaryCase(tokens=2, heads=n, qk_norm=True)),
        Visit(test_ops.rotary, "head_dim", lambda n: RotaryCase(tokens=3, heads=2, head_dim=n, rotary_dim=n)),
        Visit(
            test_ops.qkv_norm_rope,
            "head_dim",
            lambda n: RotaryCase(tokens=3, heads=2, head_dim=n, rotary_dim=n // 2, qk_norm=True),
        ),
        Visit(test_ops.rotary, "positions", lambda n: RotaryCase(tokens=3, rotary_dim=2, furthest=n)),
        Visit(
            test_ops.qkv_norm_rope,
            "positions",
            lambda n: RotaryCase(tokens=3, rotary_dim=2, furthest=n, interleaved=True),
            sizes=(4097, 32_769, 65_537, 131_071),
        ),
        Visit(test_adapters.low_rank, "columns", lambda n: LowRankCase(tokens=3, columns=n, rows=(8,)), most=16_384),
        Visit(test_adapters.low_rank, "features", lambda n: LowRankCase(tokens=3, rows=(n, 8)), most=4097),
        Visit(
            test_adapters.low_rank,
            "rank",
            lambda n: LowRankCase(tokens=5, columns=24, rows=(16, 8), max_rank=n, ranks=(n, max(1, n - 1), 0, 1)),
        ),
        Visit(
            test_adapters.low_rank,
            "adapters",
            lambda n: LowRankCase(tokens=40, columns=8, rows=(8,), max_rank=4, ranks=(4, 2, 3), slots=n),
        ),
    )
)


@kind("op.reach_width", corpus=WIDTHS.corpus, quick=2, deadline_s=_DEADLINE_S)
def width(device: Device, case: VisitCase) -> None:
    """Every op over wide rows, many and wide heads, far positions, and adapters of large rank."""
    WIDTHS.check(device, case)


VOCABULARIES = Visits(
    (
        Visit(test_ops.embedding, "vocabulary", lambda n: EmbeddingCase(rows=n, vocab=n, width=4), variant="whole"),
        Visit(
            test_ops.embedding,
            "vocabulary",
            lambda n: EmbeddingCase(rows=20, first=n - 25, vocab=n, width=4),
            variant="a share at the end",
        ),
        Visit(test_ops.softcap, "vocabulary", lambda n: OpCase(tokens=2, width=n, option="30")),
        Visit(test_ops.token_masks, "vocabulary", lambda n: OpCase(tokens=2, width=n)),
        Visit(test_ops.edit_logits, "vocabulary", lambda n: OpCase(tokens=2, width=n)),
        Visit(test_ops.edit_logits, "times", lambda n: OpCase(tokens=3, width=40, option=str(n))),
        Visit(test_ops.count_tokens, "vocabulary", lambda n: OpCase(tokens=4, width=n)),
        Visit(test_ops.count_tokens, "times", lambda n: OpCase(tokens=4, width=1, option=str(n))),
    )
)


@kind("op.reach_vocabulary", corpus=VOCABULARIES.corpus, quick=1, deadline_s=_DEADLINE_S)
def vocabulary(device: Device, case: VisitCase) -> None:
    """Every op over token ids: the last id counts as the first does, and so does a token that was drawn often."""
    VOCABULARIES.check(device, case)


def _edges(vocab: int, **more: object) -> SampleCase:
    return SampleCase(vocab=vocab, edges=True, **more)  # type: ignore[arg-type]


DRAWS = Visits(
    (
        Visit(test_sampling.greedy, "vocabulary", lambda n: _edges(n, rows=8, temperature=(0.0,))),
        Visit(test_sampling.draw, "vocabulary", lambda n: _edges(n, rows=24, exact=True), most=152_064),
        Visit(
            test_sampling.truncation,
            "vocabulary",
            lambda n: SampleCase(vocab=n, rows=3, top_k=(0, 300, 0), top_p=(0.9, 1.0, 1.0), min_p=(0.0, 0.0, 0.02)),
            sizes=(4097, 65_537, 152_064),
        ),
        Visit(test_sampling.ties, "vocabulary", lambda n: _edges(n, rows=12, exact=True, top_k=(3, 7)), least=32_767),
        Visit(test_sampling.logprobs, "vocabulary", lambda n: _edges(n, rows=8)),
        Visit(test_sampling.greedy, "rows", lambda n: SampleCase(rows=n, temperature=(0.0,), vocab=9)),
        Visit(test_sampling.draw, "rows", lambda n: SampleCase(rows=n, vocab=9), most=513),
        Visit(
            test_sampling.truncation, "rows", lambda n: SampleCase(rows=n, vocab=9, top_k=(3, 0)), least=127, most=257
        ),
        Visit(test_sampling.logprobs, "rows", lambda n: SampleCase(rows=n, vocab=30)),
        Visit(test_sampling.draw, "positions", lambda n: SampleCase(rows=6, exact=True, position=n)),
        Visit(test_sampling.truncation, "ids kept", lambda n: SampleCase(rows=6, vocab=1100, spread=0.2, top_k=(n,))),
        Visit(test_sampling.logprobs, "ids kept", lambda n: SampleCase(rows=2, vocab=1100, num_top=n)),
    )
)


@kind("sample.reach", corpus=DRAWS.corpus, quick=1, deadline_s=_DEADLINE_S)
def draws(device: Device, case: VisitCase) -> None:
    """Draws over vocabularies of up to 262,144 ids, the last of which are as likely as any, over many rows, and at far
    positions."""
    DRAWS.check(device, case)
