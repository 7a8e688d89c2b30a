"""Paged attention. Override kv_layout, make_cache, plan, write_kv and attend; or forward, when a kernel fuses them."""

from anychip.ops.reference import ReferenceAttention


class AcmeAttention(ReferenceAttention):
    name = "acme"
