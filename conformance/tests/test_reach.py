"""The table of reach has visitors for every size, every op is tried in every form, and forms are what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.plugin_api.ops import OP_VERSIONS
from anychip_conformance.device import Device, open_device
from anychip_conformance.facts import relaxations
from anychip_conformance.forms import FORMS, laid_out
from anychip_conformance.needles import places
from anychip_conformance.reach import REACH, dimension, table
from anychip_conformance.registry import all_cases, find_case
from anychip_conformance.run import run_case
from anychip_conformance.verdicts import Outcome, Verdict
from anychip_conformance.visits import visited

DOCS = Path(__file__).parents[2] / "docs"


def test_every_size_of_the_table_has_a_visitor_and_no_other_size_has() -> None:
    assert visited(all_cases()) == {found.name: set(found.sizes) for found in REACH}


def test_the_largest_sizes_are_those_of_real_models() -> None:
    largest = {found.name: max(found.sizes) for found in REACH}
    for name, least in {
        "context": 131_072, "vocabulary": 152_064, "rows": 512, "experts": 256, "top_k": 8, "positions": 131_072,
        "window": 4096, "heads": 128, "hidden": 16_384, "columns": 53_248, "features": 152_064,
    }.items():  # fmt: skip
        assert largest[name] >= least, name


def test_core_visits_what_it_must_hold() -> None:
    core = visited(case for case in all_cases() if case.kind.profile == "core")
    for found in REACH:
        if found.name not in ("message", "ranks", "groups"):  # of other profiles
            assert max(core[found.name]) == max(found.sizes), found.name


def test_the_table_is_on_the_page() -> None:
    assert table() in (DOCS / "reference" / "conformance.md").read_text(), "print reach.table() there"


# -- forms --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8]),
    written=st.booleans(),
)
def test_a_form_changes_where_values_lie_and_not_what_they_are(
    shape: list[int], form: Any, dtype: torch.dtype, written: bool
) -> None:
    tidy = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    found = laid_out(tidy, form, written=written)
    expanded = found.dim() > 1 and found.shape[0] > 1 and found.stride(0) == 0
    assert torch.equal(found, tidy[:1].expand_as(tidy) if expanded else tidy)
    assert found.stride(-1) == 1 or found.shape[-1] == 1, "the last dimension is contiguous"
    assert not (written and expanded), "what may be overwritten has no stride of 0"
    moved = found.storage_offset() > 0 or found.stride() != tidy.stride() or form == "turned"
    assert moved or tidy.shape[0] == 1 or form in ("expanded", "spaced"), "it is a view"


def test_no_form_hides_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op is called by the cases of forms, and every one is given views."""
    device = open_device("fake-faulty", {})
    called: dict[str, bool] = {}

    def recording(name: str, op: Any) -> Any:
        def call(**arguments: Any) -> Any:
            tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.numel()]
            views = any(value.storage_offset() or not value.is_contiguous() for value in tensors)
            called[name] = called.get(name, False) or views
            return op(**arguments)

        return call

    assert device.table is not None
    wrapped = SimpleNamespace(**{name: recording(name, op) for name, op in vars(device.table.ops).items()})
    monkeypatch.setattr(device, "table", dataclasses.replace(device.table, ops=wrapped))
    for id in ("op.form.003", "sample.form.003"):
        assert run(device, id).verdict is Verdict.PASS
    device.close()
    assert {name for name, views in called.items() if views} == set(OP_VERSIONS)


def run(device: Device, id: str, **rest: Any) -> Outcome:
    case = find_case(id)
    assert case is not None, id
    return run_case(device, case, **rest)


# -- slow simulations, and needles --------------------------------------------------------------------------------


def test_a_simulation_is_judged_up_to_its_reach_and_says_so() -> None:
    device = open_device("fake-faulty", {"fault": "attn-keys-past-4096"})
    assert run(device, "attn.reach_context.001").verdict is Verdict.FAIL
    slow = dataclasses.replace(device.probe.devices[0], reach=4096)
    device.probe = dataclasses.replace(device.probe, devices=(slow,))
    assert run(device, "attn.reach_context.001").verdict is Verdict.PASS
    assert "a simulation, judged at sizes up to 4,096" in relaxations(device)
    one = b'{"visit":"attn.decode of one head","dimension":"context","sizes":[8192]}'
    assert run(device, "attn.reach_context.001", params=one).verdict is Verdict.NOT_SUPPORTED
    device.probe = dataclasses.replace(device.probe, devices=(dataclasses.replace(slow, backing="hardware"),))
    assert "reach is for simulations" in run(device, "isolation.capabilities.001").message
    device.close()


@pytest.mark.parametrize("window", [None, 7, 4096])
@pytest.mark.parametrize("context", [1, 2, 127, 4097, max(dimension("context").sizes)])
def test_every_query_sees_every_needle_and_the_last_key_is_one(context: int, window: int | None) -> None:
    for queries in (1, 3):
        found = places(context, window, queries)
        first = 0 if window is None else max(0, context + queries - window)
        assert found.max() == context - 1 and found.min() >= first
