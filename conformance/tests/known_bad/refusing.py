"""Declares next to nothing, and refuses the rest as it should."""

from anychip.plugin_api import Capabilities, Platform


class BadPlatform(Platform):
    capabilities = Capabilities(
        dtypes=frozenset({"float16"}), kv_dtypes=frozenset({"float16"}), head_dims=frozenset({1024})
    )

    def kv_budget(self, profile):
        return 2**26
