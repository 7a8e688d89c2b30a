"""AscendPlatform: every factory refuses until its kernels exist. Nothing falls back to reference ops on the host."""

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


class AscendPlatform(Platform):
    def attention(self, spec: AttentionSpec) -> NoReturn:
        raise Unsupported("anychip-ascend", ["attention is not implemented yet"])

    def linear(self, spec: LinearSpec) -> NoReturn:
        raise Unsupported("anychip-ascend", ["matrix products are not implemented yet"])

    def moe(self, spec: MoESpec) -> NoReturn:
        raise Unsupported("anychip-ascend", ["mixture of experts is not implemented yet"])

    def communicator(self, group: GroupSpec) -> Communicator:
        if group.size > 1:
            raise Unsupported("anychip-ascend", ["collectives are not implemented yet"])
        return Communicator(group)
