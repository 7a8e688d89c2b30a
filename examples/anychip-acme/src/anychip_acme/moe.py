"""Mixture of experts. Override experts first, then route; apply when your kernel fuses them."""

from anychip.ops.reference import ReferenceMoE


class AcmeMoE(ReferenceMoE):
    name = "acme"
