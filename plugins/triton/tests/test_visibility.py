"""Devices that an environment leaves to be seen."""

from __future__ import annotations

import pytest

from anychip_triton.visibility import visible

UUIDS = ("GPU-aaaa-1111", "GPU-bbbb-2222")


@pytest.mark.parametrize(
    ("setting", "indexes"),
    [(None, [0, 1]), ("0,1", [0, 1]), ("1,0", [1, 0]), ("GPU-bbbb", [1]), ("GPU-", []), ("1,7,0", [1]), ("-1,0", [])],
)
def test_visible_devices_are_those_that_the_setting_names(setting, indexes):
    assert visible(setting, UUIDS) == indexes
