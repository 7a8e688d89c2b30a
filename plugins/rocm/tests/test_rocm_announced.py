"""The announced plugin imports without its device, says why it cannot run, and refuses by name."""

from __future__ import annotations

import pytest

from anychip.ops.reference import REFERENCE
from anychip.plugin_api import AttentionSpec, PlatformContext, ProbeResult, Unsupported
from anychip_rocm import MANIFEST
from anychip_rocm.platform import RocmPlatform
from anychip_rocm.probe import probe


def test_probe_without_the_device_gives_reason_and_remedy():
    result = probe()
    assert result.devices or (result.reason and result.remedy)


def test_attention_is_refused_by_name():
    platform = RocmPlatform(
        PlatformContext(
            manifest=MANIFEST,
            device_indexes=(0,),
            options=MANIFEST.options(),
            probe=ProbeResult(),
            reference=REFERENCE,
        )
    )
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", kv_dtype="bfloat16")
    with pytest.raises(Unsupported, match="anychip-rocm: attention is not implemented yet"):
        platform.attention(spec)
