"""Rows of latent attention in fp8: what is attended to are the rows as fp8 rounds them, and nothing else differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anychip.ops.reference import ReferenceLatent
from anychip.plugin_api import LatentBackend
from anychip.plugin_api.refusals import undeclared
from anychip_conformance.batch import Row
from anychip_conformance.device import Device, open_device
from anychip_conformance.latent_calls import LatentCall, LatentCase

ROWS = (Row(blocks=2, extra=8, query=5), Row(blocks=8, extra=2, query=1), Row(blocks=0, extra=0, query=200))
"""On the cpu 200 queries are expanded, and a few are absorbed."""
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def cpu() -> Device:
    return open_device("cpu", {})


def rounded(rows: Tensor) -> Tensor:
    """The nearest values of fp8."""
    return rows.clamp(-448, 448).to(FP8).to(rows.dtype)


def over_rounded_rows(device: Device, case: LatentCase) -> tuple[Tensor, Tensor]:
    """What the device's own backend gives over plain rows that fp8 holds exactly, and those rows."""
    call = LatentCall.make(device, case)
    call.cache = call.backend.import_arrays(call.cache, range(call.num_blocks), {"latent": rounded(call.held())})
    call.inputs |= {name: rounded(call.inputs[name]) for name in ("latent", "k_rope")}
    return call.run(), call.held()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("of_reference", [True, False], ids=["reference", "cpu"])
def test_rows_in_fp8_are_attended_to_as_their_rounded_values(cpu, of_reference, dtype, window):
    case = LatentCase(rows=ROWS, dtype=dtype, latent_dim=64, nope_dim=16, v_dim=16, window=window, pad_tokens=2)
    expected, rows = over_rounded_rows(cpu, case)
    call = LatentCall.make(cpu, case)
    spec = replace(case.spec, kv_dtype="float8_e4m3fn")
    backend: LatentBackend = ReferenceLatent(spec) if of_reference else cpu.platform.latent(spec)
    held = call.held().clamp(-448, 448).to(FP8).view(torch.uint8)
    size = call.num_blocks * backend.kv_layout().page_bytes(call.block_size)
    cache = backend.make_cache(torch.zeros(size, dtype=torch.uint8), call.num_blocks, call.block_size)
    call.backend, call.cache = backend, backend.import_arrays(cache, range(call.num_blocks), {"latent": held})
    found = call.run()
    wide = 2e-2 if dtype == "bfloat16" else 2e-5
    torch.testing.assert_close(found, expected, rtol=wide, atol=wide)
    kept = call.held()
    assert kept.dtype == torch.uint8, "blocks cross between devices as bytes"
    torch.testing.assert_close(kept.view(FP8).to(rows.dtype)[1:], rows[1:], rtol=0, atol=0, equal_nan=True)


def test_values_beyond_fp8s_range_become_its_largest(cpu):
    case = LatentCase(rows=(Row(blocks=0, extra=0, query=3),), dtype="float32")
    backend = ReferenceLatent(replace(case.spec, kv_dtype="float8_e4m3fn"))
    rows = torch.tensor([1e6, -1e6, 1.0])
    assert backend.decoded(backend.encoded(rows)).tolist() == [448.0, -448.0, 1.0]


def test_a_device_that_does_not_declare_them_refuses_them_by_name(cpu):
    spec = replace(LatentCase(rows=ROWS, dtype="bfloat16").spec, kv_dtype="float8_e4m3fn")
    assert not undeclared(spec, cpu.capabilities)
    (reason,) = undeclared(spec, replace(cpu.capabilities, latent_kv_dtypes=frozenset()))
    assert reason == "latent rows in float8_e4m3fn; bfloat16 is nearest; available: bfloat16"
