"""The n-th call of one object (reach.REACH, calls): what it counts and keeps does not run over."""

from __future__ import annotations

import msgspec

from anychip_conformance.batch import Row
from anychip_conformance.case import kind
from anychip_conformance.cases import test_linear, test_moe, test_sampling
from anychip_conformance.cases.test_linear import LinearCase
from anychip_conformance.cases.test_moe import MoECase
from anychip_conformance.cases.test_sampling import SampleCase
from anychip_conformance.choices import resolved
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase, Call
from anychip_conformance.paged_judge import judge_output
from anychip_conformance.reach import dimension
from anychip_conformance.visits import VisitCase

_DEADLINE_S = 240.0
CALLS = VisitCase(visit="one object", dimension="calls", sizes=dimension("calls").sizes)


def judged_calls(device: Device, case: VisitCase, largest: int) -> list[bool]:
    """By call, whether it is judged; others are made and not looked at."""
    device.reaches(case.dimension, largest)
    return [call in case.sizes for call in range(1, largest + 1)]


@kind("attn.calls", corpus=[CALLS], quick=0, deadline_s=_DEADLINE_S)
def attention_calls(device: Device, case: VisitCase) -> None:
    """One backend, planned and called a thousand times, with two batches in turns."""
    params = AttentionCase(rows=(Row(0, 3, 1), Row(0, 0, 2)), num_heads=2, num_kv_heads=1)
    made = [Call.make(device, resolved(msgspec.structs.replace(params, seed=seed), device)) for seed in (0, 1)]
    made[1].backend = made[0].backend
    for number, judged in enumerate(judged_calls(device, case, max(case.sizes))):
        call = made[number % 2]
        result = call.run()
        if judged:
            judge_output(device, call, result)


@kind("linear.calls", corpus=[CALLS], quick=0, deadline_s=_DEADLINE_S)
def linear_calls(device: Device, case: VisitCase) -> None:
    """One kernel, applied a thousand times to other tokens."""
    loaded = test_linear.Loaded(device, resolved(LinearCase(columns=16, rows=(8,)), device))
    inputs = [loaded.inputs(tokens, salt=tokens) for tokens in (1, 3, 8)]
    for number, judged in enumerate(judged_calls(device, case, max(case.sizes))):
        x = inputs[number % len(inputs)]
        result = loaded.kernel.apply(x, loaded.packed)
        if judged:
            loaded.judge(x, result)


@kind("moe.calls", corpus=[msgspec.structs.replace(CALLS, sizes=CALLS.sizes[:-1])], quick=0, deadline_s=_DEADLINE_S)
def expert_calls(device: Device, case: VisitCase) -> None:
    """One layer of experts, applied hundreds of times."""
    params = resolved(MoECase(tokens=3, experts=4, hidden=8, intermediate=8), device)
    loaded = test_moe.Loaded(device, params)
    x, logits, bias = loaded.inputs()
    for judged in judged_calls(device, case, max(case.sizes)):
        result = loaded.kernel.apply(x, logits, loaded.packed, router_bias=bias)
        if judged:
            loaded.judge(x, logits, bias, None, result)


@kind("sample.calls", corpus=[CALLS], quick=0, deadline_s=_DEADLINE_S)
def draw_calls(device: Device, case: VisitCase) -> None:
    """A thousand draws, each at a position of its own."""
    device.need("seeded_sampling", device.capabilities.seeded_sampling)
    params = SampleCase(rows=3, vocab=9)
    logits = test_sampling.logits_of(device, params)
    for number, judged in enumerate(judged_calls(device, case, max(case.sizes))):
        given = test_sampling.arguments(device, params, position=number)
        ids = device.ops.ops.sample(logits=logits, all_greedy=False, **given)
        if judged:
            test_sampling.judge(device, params, ids, logits, number)
