"""The simulated platforms impose what they stand for: what a careless core would do to them fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from anychip import LLM
from anychip.ops.reference import EditState
from anychip.plugin_api import ShapeKey, sampling_features
from anychip_conformance.equality.oracle import Answer, judge
from anychip_conformance.equality.tiny_models import FAMILIES, THROUGH_TRANSFORMERS, make_checkpoint
from anychip_conformance.equality.workload import CANNOT, SELDOM, covering, full_product
from anychip_conformance.fakes.compiled import CompiledCall, UncompiledShape
from anychip_conformance.fakes.hostlen import HostlenGraphs
from anychip_conformance.fakes.recorded import HostCopyInCapture, HostReadInCapture
from anychip_conformance.fakes.static import DonatedState, DonatedTwice, Held

ALWAYS_TRACED = ("llama",)
FULLY_TRACED = tuple(
    family
    for family in (*FAMILIES, *THROUGH_TRANSFORMERS)
    if family not in ALWAYS_TRACED and (family, "fake-static") not in CANNOT
)
"""make_fx takes seconds for one."""


def test_a_compiled_call_refuses_any_other_shape_or_dtype():
    call = CompiledCall(lambda x: x + 1, (torch.zeros(4),))
    assert call(torch.ones(4)).tolist() == [2.0] * 4
    with pytest.raises(UncompiledShape):
        call(torch.zeros(5))
    with pytest.raises(UncompiledShape):
        call(torch.zeros(4, dtype=torch.int32))


def test_a_compiled_call_cannot_read_a_value_on_the_host():
    call = CompiledCall(lambda x: x[: int(x.sum())], (torch.ones(4),))
    with pytest.raises(HostReadInCapture):
        call(torch.ones(4))


def test_a_compiled_call_computes_with_what_it_is_given_not_with_what_it_was_traced_with():
    call = CompiledCall(lambda x: x * 2, (torch.zeros(2),))
    assert [call(torch.full((2,), value)).tolist() for value in (1.0, 3.0)] == [[2.0, 2.0], [6.0, 6.0]]


def test_a_compiled_call_does_again_what_was_done_in_place_and_leaves_constants_alone():
    def counted(x: torch.Tensor) -> dict[str, torch.Tensor]:
        fresh = torch.tensor([1.0, 2.0])
        view = x[1:]
        view.add_(fresh)
        fresh.mul_(2)
        return {"all": x, "both": torch.cat([view, fresh])}

    call = CompiledCall(counted, (torch.zeros(3),))
    for _ in range(2):
        given = torch.tensor([5.0, 6.0, 7.0])
        result = call(given)
        assert result["all"] is given
        assert given.tolist() == [5.0, 7.0, 9.0]
        assert result["both"].tolist() == [7.0, 9.0, 2.0, 4.0]


@pytest.mark.parametrize("max_drafts", [0, pytest.param(2, marks=pytest.mark.full)])
def test_every_program_of_a_warm_up_can_be_traced(max_drafts, tmp_path):
    """A run traces only those that it calls. The larger steps differ from the smallest in their numbers alone."""
    with warmed_up("llama", tmp_path, max_drafts) as (steps, samplers):
        assert len(steps) == 2 and len(samplers) == len(list(sampling_features(max_drafts)))
        for call in (*steps, *samplers):
            call.trace()


@pytest.mark.parametrize(
    "family", [*ALWAYS_TRACED, *(pytest.param(name, marks=pytest.mark.full) for name in FULLY_TRACED)]
)
def test_a_tape_computes_what_torchs_own_graph_does(family, tmp_path):
    with warmed_up(family, tmp_path) as (steps, samplers):
        for call in (steps[0], samplers[0]):
            fn, example = call._untraced
            graph = make_fx(fn)(*example)
            expected, drawn = (tree_leaves(run(*deepcopy(example))) for run in (graph, call))
            assert len(expected) == len(drawn) > 0
            assert all(a.equal(b) for a, b in zip(expected, drawn, strict=True))


@contextmanager
def warmed_up(
    family: str, folder: Path, max_drafts: int = 0
) -> Iterator[tuple[list[CompiledCall], list[CompiledCall]]]:
    """The smallest steps and samplers that fake-static compiles for a model, not traced."""
    make_checkpoint(family, folder)
    settings = {"dtype": "float32", "max_model_len": 96, "num_kv_blocks": 16, "skip_tokenizer": True}
    speculation = {"speculate": "ngram", "max_drafts": max_drafts} if max_drafts else {}
    with LLM(str(folder), device="fake-static", **settings, **speculation) as llm, torch.inference_mode():
        program = llm.engine.executor.worker.program
        smallest = min(key.num_tokens for key in program._steps)
        steps = [call for key, call in program._steps.items() if key.num_tokens == smallest]
        yield steps, [call for (samples, _), call in program._samplers.items() if samples == smallest]


@pytest.mark.parametrize(
    "fn", [lambda x: x * x.new_tensor(2.0), lambda x: x + torch.tensor([1.0, 2.0]), lambda x: x[torch.tensor([1, 0])]]
)
def test_a_recording_takes_no_value_from_the_host(fn):
    """A device would wait for the copy, or make it once and never again."""
    x, key = torch.ones(2), ShapeKey(num_tokens=2, num_reqs=1, num_samples=1, max_query_len=2, num_pages=1)
    with pytest.raises(HostCopyInCapture, match="from the host"):
        HostlenGraphs().capture(lambda: fn(x), key)


def test_a_recording_replays_a_collective_with_what_its_input_holds_by_then():
    graphs, x = HostlenGraphs(), torch.ones(2)
    key = ShapeKey(num_tokens=2, num_reqs=1, num_samples=1, max_query_len=2, num_pages=1)
    handle = graphs.capture(lambda: graphs.collective(lambda y: y * 10, (x + 0,)) + 1, key)
    x.fill_(3)
    assert graphs.run(handle, []).tolist() == [31.0, 31.0]


def test_a_donated_state_cannot_be_used_again():
    state = DonatedState(Held([], torch.zeros(1), EditState.blank(1, 2), torch.zeros(0, 2), []))
    state.take()
    with pytest.raises(DonatedTwice):
        state.take()


def test_a_recorded_graph_replays_on_what_its_storage_holds_now():
    graphs, x = HostlenGraphs(), torch.tensor([1.0, 2.0])
    handle = graphs.capture(lambda: (x * 2).sum(), None)
    x.copy_(torch.tensor([5.0, 6.0]))
    assert graphs.run(handle, []).item() == 22.0


def test_a_recorded_region_cannot_read_a_value_on_the_host():
    with pytest.raises(HostReadInCapture):
        HostlenGraphs().capture(lambda: torch.ones(1).item(), None)


def test_the_covering_array_holds_every_pair():
    def pairs(case):
        values = [getattr(case, name) for name in case.__slots__]
        return {(i, values[i], j, values[j]) for i in range(6) for j in range(i)}

    covered = {pair for case in covering() for pair in pairs(case)}
    cases = [case for case in full_product() if case.family not in SELDOM]
    left_out = {pair for case in cases for pair in pairs(case)} - covered
    assert all((i, j) in ((5, 0), (1, 0)) for i, _, j, _ in left_out), (
        "only a family and a device or budget may not meet"
    )
    devices = Counter(family for _, _, family in {(i, a, b) for i, a, j, b in covered if (i, j) == (5, 0)})
    families = len({**FAMILIES, **THROUGH_TRANSFORMERS})
    assert len(devices) == families - len(SELDOM) and min(devices.values()) >= 2
    budgets = Counter(family for _, _, family in {(i, a, b) for i, a, j, b in covered if (i, j) == (1, 0)})
    assert len(budgets) == families - len(SELDOM) and min(budgets.values()) >= 2
    assert len(full_product()) == (families * 5 - len(CANNOT)) * 3 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("tokens", "divergence", "excused"),
    [([5, 6, 7], None, False), ([5, 9, 7], 1, True), ([9, 6, 7], 0, False), ([5, 9, 9], 1, True)],
)
def test_only_a_close_first_divergence_is_excused(tokens, divergence, excused):
    answer = Answer([5, 6, 7], margins=[1.0, 1e-6, 1.0], bounds=[1e-4] * 3)
    verdict = judge(answer, tokens)
    assert (verdict.divergence, verdict.excused) == (divergence, excused)
