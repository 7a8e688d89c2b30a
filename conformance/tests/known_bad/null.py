"""Answers everything with zeros."""

import torch

from anychip.ops.reference import ReferenceAttention, ReferenceLinear
from anychip.plugin_api import Platform


class NullAttention(ReferenceAttention):
    def attend(self, q, cache, plan, layer, *, out=None):
        return torch.zeros_like(q)


class NullLinear(ReferenceLinear):
    def apply(self, x, packed, *, out=None):
        return x.new_zeros(len(x), self.spec.out_features)


class BadPlatform(Platform):
    def attention(self, spec):
        return NullAttention(spec)

    def linear(self, spec):
        return NullLinear(spec, self)
