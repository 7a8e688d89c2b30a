"""Shapes, and graphs that are replayed on other batches than they were captured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
from torch import Tensor

from anychip.plugin_api import GraphLevel, Recorder, RunOutsideGraph, StepLimits, StepRules
from anychip.types import cdiv
from anychip_conformance.batch import Row, usual_limits
from anychip_conformance.case import kind
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase, Call
from anychip_conformance.paged_judge import judge_cache, judge_output


class ShapeCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    max_tokens: int = 64
    max_rows: int = 16
    pages: int = 8
    drafts: int = 0


@kind(
    "shape.policy",
    corpus=[
        ShapeCase(),
        ShapeCase(max_tokens=512, max_rows=4),
        ShapeCase(max_tokens=16, max_rows=16, pages=1),
        ShapeCase(drafts=4),
    ],
)
def policy(device: Device, case: ShapeCase) -> None:
    """Every step that obeys the device's rules and the limits has a shape that holds it; a shape's own sizes lead back
    to it."""
    rules = device.platform.step_rules
    rows, length = min(case.max_rows, rules.max_rows or case.max_rows), 16 * case.pages
    bounds = (case.max_tokens, rules.max_tokens, rules.max_padded_tokens, rows * length)
    tokens = min(bound for bound in bounds if bound is not None)
    limits = StepLimits(
        max_num_tokens=tokens,
        max_num_reqs=rows,
        max_model_len=length,
        max_slots=rows,
        max_pages=(case.pages,),
        max_drafts=case.drafts,
    )
    shapes = device.platform.shape_policy(limits)
    for num_tokens in range(1, tokens + 1):
        for num_rows in sorted({1, 2, cdiv(num_tokens, length), rows, num_tokens}):
            longest = _longest(rules, limits, num_tokens, num_rows)
            if longest is None:
                continue
            num_samples = min(num_tokens, num_rows * (1 + case.drafts))
            key = shapes.bucket(
                num_tokens=num_tokens,
                num_reqs=num_rows,
                num_samples=num_samples,
                max_query_len=longest,
                num_pages=case.pages,
                features=(),
            )
            step = f"{num_tokens} tokens in {num_rows} rows"
            assert key.num_samples >= num_samples, f"{step} with {num_samples} samples do not fit {key}"
            assert key.num_tokens >= num_tokens and key.num_reqs >= num_rows, f"{step} do not fit {key}"
            assert key.max_query_len == 0 or key.max_query_len >= longest, f"a row of {longest} does not fit {key}"
            assert key.num_pages == 0 or key.num_pages >= case.pages, f"{case.pages} pages do not fit {key}"
    for key in shapes.keys():  # noqa: SIM118 - a policy is no mapping
        longest = _longest(rules, limits, key.num_tokens, key.num_reqs)
        if longest is None or key.num_tokens > tokens:
            continue  # larger than any step that it holds
        again = shapes.bucket(
            num_tokens=key.num_tokens,
            num_reqs=key.num_reqs,
            num_samples=key.num_samples,
            max_query_len=min(key.max_query_len or longest, longest),
            num_pages=key.num_pages,
            features=key.features,
        )
        sizes = [(each.num_tokens, each.num_reqs, each.num_samples) for each in (again, key)]
        assert sizes[0] == sizes[1], f"{key} leads to {again}"


def _longest(rules: StepRules, limits: StepLimits, tokens: int, rows: int) -> int | None:
    """Of the longest row of a step of so many tokens and rows. None: no such step obeys the rules and the limits."""
    if not 1 <= rows <= min(tokens, limits.max_num_reqs):
        return None
    longest = min(tokens - rows + 1, limits.max_model_len)
    if rules.max_padded_tokens is not None:
        longest = min(longest, rules.max_padded_tokens // rows)
    others = rows if rules.max_prefills is None else min(rows, rules.max_prefills)
    # As many rows as may be prompts have the longest, the others one token.
    return longest if others * longest + rows - others >= tokens else None


def decode(*sizes: tuple[int, int]) -> tuple[Row, ...]:
    return tuple(Row(blocks, extra, 1) for blocks, extra in sizes)


A = decode((0, 5), (1, -1), (1, 0))
B = decode((1, 1), (0, 1), (0, 9), (1, 3))
C = decode((0, 2), (1, 4), (0, 0))
PAGES = 3
"""Of the longest row that a captured step must hold."""


@kind(
    "graph.replay",
    profile="graph",
    corpus=[
        AttentionCase(rows=A, dtype=dtype, **settings)  # type: ignore[arg-type]
        for dtype in ("float32", "bfloat16", "float16")
        for settings in ({}, {"window": 7}, {"rope": "neox", "qk_norm": True}, {"num_heads": 8, "num_kv_heads": 2})
    ],
)
def replay(device: Device, case: AttentionCase) -> None:
    """Captured once over padding, replayed on batches A, B, C and A: each is right, padding included, writes only its
    own slots, and A comes back to the bit."""
    device.need("graphs", device.capabilities.graph_level >= GraphLevel.FULL)
    graphs = device.platform.graph_capture()
    assert graphs.level >= GraphLevel.FULL, f"declared full graphs, and captures {graphs.level.name}"
    fixed = Call.make(device, msgspec.structs.replace(case, rows=A), least_pages=PAGES)
    recorder = Recorder()
    plan = fixed.backend.plan(fixed.batch.view, fixed.batch.key, group=0, recorder=recorder)

    def step() -> object:
        result, _ = fixed.backend.forward(
            fixed.q, fixed.k, fixed.v, fixed.cache, plan, fixed.layer, rope=fixed.rope, qk_norm=fixed.qk_norm
        )
        return result

    handle = graphs.capture(step, fixed.batch.key, recorder=recorder)
    results = []
    for rows, seed in ((A, 1), (B, 2), (C, 3), (A, 1)):
        fresh = Call.make(
            device,
            msgspec.structs.replace(case, rows=rows, seed=seed),
            least_pages=PAGES,
            num_blocks=len(fixed.watched),
        )
        assert fresh.batch.key == fixed.batch.key, f"{fresh.batch.key} and {fixed.batch.key} are one shape"
        _put(fixed, fresh)
        before = fresh.blocks().clone()
        view = dataclasses.replace(fresh.batch.view, **{name: getattr(fixed.batch.view, name) for name in _ON_DEVICE})
        renewed = fixed.backend.plan(view, fixed.batch.key, group=0, into=plan)
        result = graphs.run(handle, [renewed])
        judge_cache(device, fresh, before, None)
        judge_output(device, fresh, result)
        results.append(result.clone()[: fresh.batch.num_tokens])
    device.same_bits("A replayed again", results[3].contiguous(), results[0].contiguous())


MIXED = ((Row(0, 5, 3), Row(1, 4, 1), Row(0, 9, 4)), (Row(1, 2, 6), Row(0, 1, 1)), (Row(0, 7, 7),))
"""Prompts and single tokens of which the first step fills its pieces."""


@kind(
    "graph.pieces",
    profile="graph",
    corpus=[
        AttentionCase(rows=MIXED[0], dtype=dtype, **settings)  # type: ignore[arg-type]
        for dtype in ("float32", "bfloat16")
        for settings in ({}, {"rope": "neox", "qk_norm": True})
    ],
)
def pieces(device: Device, case: AttentionCase) -> None:
    """Work before and after attention is captured once for a number of tokens, and replayed with other rows: attention
    between the pieces sees the step's own plan, and the second piece what it returned."""
    counts = device.platform.shape_policy(usual_limits(device)).pieces()
    device.need("pieces", device.capabilities.graph_level >= GraphLevel.PIECEWISE and bool(counts))
    calls = [
        Call.make(device, msgspec.structs.replace(case, rows=rows, seed=seed))
        for seed, rows in enumerate((*MIXED, MIXED[0]))
    ]
    num_tokens = calls[0].batch.key.num_tokens
    assert num_tokens in counts, f"a step of {calls[0].batch.num_tokens} tokens has {num_tokens}; pieces have {counts}"
    graphs = device.platform.graph_capture()
    fixed = [x.clone() for x in _inputs(calls[0])]
    current = [calls[0]]

    def region(run_outside_graph: RunOutsideGraph) -> Tensor:
        doubled = [x * 2 for x in fixed]

        def attend(plans: Sequence[Any], out: Tensor | None) -> Tensor:
            call, (q, k, v) = current[0], (x / 2 for x in doubled)
            result, call.cache = call.backend.forward(
                q, k, v, call.cache, plans[0], call.layer, rope=call.rope, qk_norm=call.qk_norm, out=out
            )
            return result

        return run_outside_graph(attend) * 4

    def plan(call: Call) -> object:
        return call.backend.plan(call.batch.view, call.batch.key, group=0)

    handle = graphs.capture_pieces(region, [plan(calls[0])], num_tokens)
    for call in calls:
        current[0] = call
        before = call.blocks().clone()
        for mine, its in zip(fixed, _inputs(call), strict=True):
            mine.copy_(its)
        result = graphs.run_pieces(handle, [plan(call)]) / 4
        judge_cache(device, call, before, None)
        judge_output(device, call, result)


def _inputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    assert call.k is not None and call.v is not None
    return call.q, call.k, call.v


_ON_DEVICE = ("query_start", "seq_lens", "block_table", "slot_mapping", "positions")


def _put(fixed: Call, fresh: Call) -> None:
    """Puts a batch into the storage that the graph was captured over; `fresh` then looks at that."""
    for name in _ON_DEVICE:
        getattr(fixed.batch.view, name).copy_(getattr(fresh.batch.view, name))
    assert fixed.k is not None and fixed.v is not None and fresh.k is not None and fresh.v is not None
    fixed.q.copy_(fresh.q)
    fixed.k.copy_(fresh.k)
    fixed.v.copy_(fresh.v)
    fixed.cache = fixed.backend.import_blocks(fixed.cache, fresh.watched, fresh.blocks())
    fresh.cache, fresh.backend, fresh.raw = fixed.cache, fixed.backend, fixed.raw
    fresh.layer, fresh.rope, fresh.qk_norm = fixed.layer, fixed.rope, fixed.qk_norm
