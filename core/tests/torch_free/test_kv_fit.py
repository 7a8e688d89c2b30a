"""What is said where the KV cache is too small for a request."""

from __future__ import annotations

import pytest

from anychip.errors import KVCacheTooSmall
from anychip.launch.kv_fit import check_fits
from anychip.worker_report import DeviceRules, KVCacheConfig, KVGroup, MemoryPlan, WorkerReady

GIB = 1 << 30


def ready(**known: int) -> WorkerReady:
    memory = MemoryPlan(57 * GIB, GIB, 2 * GIB, GIB, 10, 144, 0.3, **known)
    return WorkerReady(KVCacheConfig(10, (KVGroup(block_size=16),)), DeviceRules(), memory, "fake:0")


def test_a_cache_that_is_too_small_says_what_takes_the_devices_memory():
    with pytest.raises(KVCacheTooSmall) as raised:
        check_fits(ready(usable=71 * GIB, elsewhere=10 * GIB), 512, 512)
    said = str(raised.value)
    assert "needs 32 KV blocks, 9 fit" in said and "--max-model-len to 144" in said
    assert (
        "of the 71.0 GiB that --memory-fraction allows, in GiB: weights 57.0, the largest step 1.0, graphs 2.0, "
        "other processes, the driver and its libraries 10.0"
    ) in said


def test_nothing_is_said_of_memory_that_the_device_does_not_tell():
    with pytest.raises(KVCacheTooSmall) as raised:
        check_fits(ready(), 512, 512)
    assert "GiB" not in str(raised.value)


def test_a_request_that_fits_passes():
    check_fits(ready(), 144, 144)
