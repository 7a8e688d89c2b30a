"""CudaPlatform: every factory refuses until its kernels exist. Nothing falls back to reference ops on the host."""

from __future__ import annotations

from typing import NoReturn

from anychip.plugin_api import (
    AttentionSpec,
    Communicator,
    GroupSpec,
    LinearSpec,
    MoESpec,
    Platform,
    Unsupported,
)


class CudaPlatform(Platform):
    def attention(self, spec: AttentionSpec) -> NoReturn:
        raise Unsupported("anychip-cuda", ["attention is not implemented yet"])

    def linear(self, spec: LinearSpec) -> NoReturn:
        raise Unsupported("anychip-cuda", ["matrix products are not implemented yet"])

    def moe(self, spec: MoESpec) -> NoReturn:
        raise Unsupported("anychip-cuda", ["mixture of experts is not implemented yet"])

    def communicator(self, group: GroupSpec) -> Communicator:
        if group.size > 1:
            raise Unsupported("anychip-cuda", ["collectives are not implemented yet"])
        return Communicator(group)
