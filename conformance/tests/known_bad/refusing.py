"""Declares next to nothing, no cache in any dtype among it, and refuses the rest as it should."""

from anychip.plugin_api import Capabilities, Platform


class BadPlatform(Platform):
    capabilities = Capabilities(dtypes=frozenset({"float16"}), kv_dtypes=frozenset(), quantization=frozenset())
