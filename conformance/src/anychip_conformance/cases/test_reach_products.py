"""Matrix products and experts at the sizes of real models (reach.REACH)."""

from __future__ import annotations

from anychip_conformance.case import kind
from anychip_conformance.cases import test_linear, test_moe
from anychip_conformance.cases.test_linear import LinearCase
from anychip_conformance.cases.test_moe import MoECase
from anychip_conformance.device import Device
from anychip_conformance.products import FORMATS, SCHEMES, Scheme
from anychip_conformance.visits import Visit, VisitCase, Visits

_DEADLINE_S = 240.0

DENSE = Visits(
    (
        Visit(
            test_linear.dense, "tokens", lambda n: LinearCase(tokens=n, columns=16, rows=(8,)), variant="narrow rows"
        ),
        Visit(
            test_linear.dense,
            "tokens",
            lambda n: LinearCase(tokens=n, columns=70, rows=(40, 24), bias=True, guarded=True, dtype="narrow"),
            most=1025,
            variant="parts",
        ),
        Visit(
            test_linear.dense,
            "columns",
            lambda n: LinearCase(tokens=1, columns=n, rows=(8,), needles=True),
            variant="one token",
        ),
        Visit(
            test_linear.dense,
            "columns",
            lambda n: LinearCase(tokens=9, columns=n, rows=(8, 8), dtype="narrow", needles=True),
            variant="tokens",
        ),
        Visit(test_linear.dense, "features", lambda n: LinearCase(tokens=1, columns=8, rows=(n,)), variant="one token"),
        Visit(
            test_linear.dense,
            "features",
            lambda n: LinearCase(tokens=5, columns=8, rows=(8, n, 8), bias=True, dtype="narrow"),
            most=65_537,
            variant="the middle part",
        ),
        Visit(test_linear.adopt, "features", lambda n: LinearCase(tokens=2, columns=8, rows=(n,)), least=4097),
        Visit(
            test_linear.epilogue,
            "tokens",
            lambda n: LinearCase(tokens=n, columns=16, rows=(8, 8), epilogue="silu"),
            most=1025,
        ),
        Visit(
            test_linear.epilogue,
            "intermediate",
            lambda n: LinearCase(tokens=2, columns=8, rows=(n, n), epilogue="silu"),
        ),
    )
)


@kind("linear.reach", corpus=DENSE.corpus, quick=1, deadline_s=_DEADLINE_S)
def dense(device: Device, case: VisitCase) -> None:
    """Products of many tokens, of long rows and of many features: heads over 152,064 ids, down projections of 53,248
    columns."""
    DENSE.check(device, case)


def _quantized(scheme: Scheme) -> list[Visit]:
    """Long rows, many groups, many features, many tokens."""
    name = f"{scheme.name} {scheme.scales} {scheme.group_size or ''}{' zeros' if scheme.zero_points else ''}".strip()
    check = test_linear.quantized if scheme in SCHEMES else test_linear.formats
    group = scheme.group_size
    visits = [
        Visit(
            check,
            "features",
            lambda n: LinearCase(tokens=2, columns=64, rows=(n // 32 * 32,), scheme=scheme),
            sizes=(256, 4096, 32_769),
            variant=name,
        ),
        Visit(
            check,
            "tokens",
            lambda n: LinearCase(tokens=n, columns=64, rows=(32,), scheme=scheme, dtype="narrow"),
            sizes=(65, 129, 257, 513, 1025),
            variant=name,
        ),
    ]
    if group is None:
        at = lambda n: LinearCase(tokens=2, columns=n, rows=(32,), scheme=scheme, needles=True)  # noqa: E731
        return [*visits, Visit(check, "columns", at, sizes=(4096, 16_384, 53_248), variant=name)]
    grouped = lambda n: LinearCase(tokens=2, columns=n * group, rows=(32,), scheme=scheme, needles=True)  # noqa: E731
    return [*visits, Visit(check, "groups", grouped, variant=name, most=53_248 // group)]


QUANTIZED = Visits([visit for scheme in (*SCHEMES, *FORMATS) for visit in _quantized(scheme)])


@kind("linear.reach_quantized", profile="quantization", corpus=QUANTIZED.corpus, deadline_s=_DEADLINE_S)
def quantized(device: Device, case: VisitCase) -> None:
    """Every scheme over long rows with hundreds of groups, many features and many tokens: each group keeps its own
    scale."""
    QUANTIZED.check(device, case)


def _experts(**sizes: object) -> MoECase:
    return MoECase(**{"tokens": 3, "experts": 8, "hidden": 8, "intermediate": 8, **sizes})  # type: ignore[arg-type]


EXPERTS = Visits(
    (
        Visit(
            test_moe.route,
            "experts",
            lambda n: _experts(tokens=2 + n // 8, experts=n, top_k=min(8, n // 2), every=True),
        ),
        Visit(
            test_moe.route,
            "experts",
            lambda n: _experts(
                tokens=9, experts=n, top_k=8, scoring="sigmoid", router_bias=True, groups=8, top_groups=4
            ),
            sizes=(64, 128, 256, 384, 512),
            variant="in groups",
        ),
        Visit(test_moe.route, "top_k", lambda n: _experts(tokens=9, experts=64, top_k=n)),
        Visit(test_moe.route, "tokens", lambda n: _experts(tokens=n, experts=16, top_k=2)),
        Visit(
            test_moe.experts,
            "experts",
            lambda n: _experts(tokens=2 + n // 8, experts=n, top_k=min(8, n // 2), every=True),
            sizes=(8, 64, 65, 127, 128, 129, 256, 257, 384, 512),
        ),
        Visit(test_moe.experts, "top_k", lambda n: _experts(tokens=5, experts=24, top_k=n)),
        Visit(test_moe.experts, "tokens", lambda n: _experts(tokens=n, top_k=2), most=4097),
        Visit(
            test_moe.experts,
            "tokens of an expert",
            lambda n: _experts(tokens=n, experts=16, top_k=2, crowded=True, dtype="narrow"),
        ),
        Visit(test_moe.experts, "hidden", lambda n: _experts(hidden=n, experts=3, top_k=2, every=True), most=8193),
        Visit(test_moe.experts, "intermediate", lambda n: _experts(intermediate=n, experts=3, top_k=2), most=16_384),
        Visit(
            test_moe.expert_map,
            "experts",
            lambda n: _experts(tokens=2 + n // 4, experts=n, away=n // 2, top_k=4, every=True),
            sizes=(128, 256),
        ),
        Visit(
            test_moe.local_experts,
            "experts",
            lambda n: _experts(tokens=2 + n // 8, experts=n, local=9, top_k=8, every=True),
            sizes=(65, 129, 257),
        ),
    )
)


@kind("moe.reach", corpus=EXPERTS.corpus, quick=1, deadline_s=_DEADLINE_S)
def experts(device: Device, case: VisitCase) -> None:
    """Layers of up to 512 experts, of which a token picks up to 16, and experts that all tokens pick."""
    EXPERTS.check(device, case)


BYTES = Visits(
    tuple(
        Visit(
            test_moe.quantized,
            "experts",
            lambda n, scheme=scheme: _experts(
                tokens=2 + n // 4, experts=n, hidden=32, intermediate=32, top_k=4, scheme=scheme, every=True
            ),  # type: ignore[misc]
            sizes=(65, 129, 257),
            variant=scheme.name + (" zeros" if scheme.zero_points else ""),
        )
        for scheme in test_moe.MOE_SCHEMES
    )
)


@kind("moe.reach_quantized", profile="quantization", corpus=BYTES.corpus, deadline_s=_DEADLINE_S)
def quantized_experts(device: Device, case: VisitCase) -> None:
    """Many experts of integer weights, each with its own scales."""
    BYTES.check(device, case)
