"""The one op that this plugin brings, beside the reference, and in use."""

import pytest
import torch
from anychip_acme.ops import OVERRIDES

from anychip.ops.reference import REFERENCE_OPS


@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_agrees_with_the_reference(unit_offset):
    x, weight = torch.randn(5, 64), torch.randn(64)
    given = {"x": x, "weight": weight, "eps": 1e-5, "unit_offset": unit_offset}
    torch.testing.assert_close(OVERRIDES["rms_norm"](**given), REFERENCE_OPS["rms_norm"](**given))
