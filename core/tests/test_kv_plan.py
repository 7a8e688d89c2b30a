"""Layers share the KV pool in few groups that leave little of it unused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anychip.errors import Unsupported
from anychip.plugin_api import AttentionSpec, KVLayout, dense_page_bytes
from anychip.worker.kv_plan import plan_kv

FULL = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16", kv_dtype="bfloat16")
WINDOWED = replace(FULL, window=1024)
NARROW = replace(FULL, window=4096, head_dim=32)


def backend_for(spec):
    layout = KVLayout(block_sizes=(16, 32), page_bytes=dense_page_bytes(spec))
    return SimpleNamespace(name="dense", kv_layout=lambda: layout)


def plan(specs):
    return plan_kv(specs, backend_for, None)


@given(st.lists(st.sampled_from((FULL, WINDOWED, NARROW)), min_size=1, max_size=80))
def test_every_layer_has_a_place_of_its_own(specs):
    kv = plan(specs)
    places = list(zip(kv.layer_groups, kv.layer_buffers, strict=True))
    assert len(set(places)) == len(specs)
    assert set(kv.layer_groups) == set(range(len(kv.specs)))
    assert max(kv.layer_buffers) < kv.num_buffers
    for layer, spec in enumerate(specs):
        group = kv.layer_groups[layer]
        assert kv.specs[group] == spec
        assert backend_for(spec).kv_layout().page_bytes(kv.block_sizes[group]) == kv.page_bytes


@given(st.lists(st.sampled_from((FULL, replace(FULL, window=4096))), min_size=1, max_size=80))
def test_no_more_lies_unused_than_the_groups_that_it_saves_are_worth(specs):
    kv = plan(specs)
    unused = len(kv.specs) * kv.num_buffers - len(specs)
    assert unused / len(specs) <= (len(specs) - len(kv.specs)) * 15 / 900 + 1e-9


@pytest.mark.parametrize(
    ("specs", "groups", "buffers"),
    [
        ([FULL] * 32, 1, 32),
        ([WINDOWED, FULL] * 12, 2, 12),
        ([WINDOWED] * 27 + [FULL], 15, 2),
        (([WINDOWED] * 5 + [FULL]) * 4 + [WINDOWED] * 2, 7, 4),
        (([WINDOWED] * 5 + [FULL]) * 10 + [WINDOWED] * 2, 6, 11),
    ],
    ids=["llama", "gpt-oss", "27 windowed, 1 full", "gemma-3-1b", "gemma-3-27b"],
)
def test_few_groups_are_weighed_against_unused_memory(specs, groups, buffers):
    kv = plan(specs)
    assert (len(kv.specs), kv.num_buffers) == (groups, buffers)


def test_a_model_without_layers_is_refused():
    with pytest.raises(Unsupported, match="the model has no layers"):
        plan([])
