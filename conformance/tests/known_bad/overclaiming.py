"""Declares ALiBi and quantized caches, and has neither: one is refused, the other ignored."""

from anychip.ops.reference import ReferenceAttention
from anychip.plugin_api import Platform, Unsupported


class OverclaimingAttention(ReferenceAttention):
    def __init__(self, spec):
        if spec.alibi:
            raise Unsupported("overclaiming", ["ALiBi"])
        super().__init__(spec)

    def encode(self, x, scale):
        return super().encode(x, None)


class BadPlatform(Platform):
    def attention(self, spec):
        return OverclaimingAttention(spec)
