"""Skips by itself what it does not like."""

import pytest

from anychip.ops.reference import ReferenceAttention
from anychip.plugin_api import Platform


class SkippingAttention(ReferenceAttention):
    def plan(self, batch, shape, **rest):
        pytest.skip("not today")


class BadPlatform(Platform):
    def attention(self, spec):
        return SkippingAttention(spec)
