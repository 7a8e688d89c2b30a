"""Never comes back from a product."""

import time

from anychip.ops.reference import ReferenceLinear
from anychip.plugin_api import Platform


class HangingLinear(ReferenceLinear):
    def apply(self, x, packed, *, out=None):
        time.sleep(3600)


class BadPlatform(Platform):
    def linear(self, spec):
        return HangingLinear(spec, self)
