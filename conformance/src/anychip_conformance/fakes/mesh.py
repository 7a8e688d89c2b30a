"""fake-mesh: the devices of fake-spmd as a mesh of two axes. Experts are spread along one, matrices and KV heads along
the other; what is summed along one axis is wrong along the other."""

from __future__ import annotations

from anychip.plugin_api import MeshShape
from anychip_conformance.fakes.spmd import SpmdPlatform


class MeshPlatform(SpmdPlatform):
    @property
    def device_mesh(self) -> MeshShape:
        count = len(self.context.device_indexes)
        return MeshShape(tp=count) if count % 2 else MeshShape(ep=2, tp=count // 2)
