"""Ends the process in the middle of a kernel."""

import os

from anychip.ops.reference import ReferenceAttention
from anychip.plugin_api import Platform


class CrashingAttention(ReferenceAttention):
    def attend(self, q, cache, plan, layer, *, out=None):
        os.abort()


class BadPlatform(Platform):
    def attention(self, spec):
        return CrashingAttention(spec)
