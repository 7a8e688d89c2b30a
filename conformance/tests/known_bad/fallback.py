"""Its probe finds hardware, and it computes on the host without a word."""

from anychip.plugin_api import Platform


class BadPlatform(Platform):
    pass
