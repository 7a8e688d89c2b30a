"""What Acme devices can do, and the factory of everything they do."""

from anychip.plugin_api import Capabilities, Platform
from anychip_acme.attention import AcmeAttention
from anychip_acme.linear import linear_kernel
from anychip_acme.moe import AcmeMoE
from anychip_acme.ops import OVERRIDES


class AcmePlatform(Platform):
    # Declare what works: a declared capability that fails a case is a failure, the rest is refused.
    capabilities = Capabilities(dtypes=frozenset({"float32", "bfloat16"}))

    def device(self, index):
        return "cpu"  # torch's name of your device, such as f"acme:{index}"

    def kv_budget(self, profile):
        return 2**28  # bytes; or implement memory(), and core computes it

    def attention(self, spec):
        self.check(spec)  # refuses what is not declared
        return AcmeAttention(spec)

    def moe(self, spec):
        self.check(spec)
        return AcmeMoE(spec, self)

    def linear(self, spec):
        self.check(spec)
        return linear_kernel(spec, self)

    def ops(self):
        return OVERRIDES
