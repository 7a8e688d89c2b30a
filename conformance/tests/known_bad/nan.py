"""Every output has a NaN in it."""

from anychip.ops.reference import ReferenceAttention
from anychip.plugin_api import Platform


class NanAttention(ReferenceAttention):
    def attend(self, q, cache, plan, layer, *, out=None):
        result = super().attend(q, cache, plan, layer, out=out)
        result[0, 0, 0] = float("nan")
        return result


class BadPlatform(Platform):
    def attention(self, spec):
        return NanAttention(spec)
