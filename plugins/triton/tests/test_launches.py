"""What may vary from step to step does not make another form of a kernel."""

from __future__ import annotations

import pytest

from anychip_triton.ahead import RecordingLauncher
from anychip_triton.problems import attention, experts, product
from anychip_triton.targets import TARGETS

LAYER = {"heads": 8, "kv_heads": 2, "dim": 64}
STEPS = [
    (lambda launch, n: attention(launch, **LAYER, rows=n, queries=5, context=16 * n), (3, 16, 31)),
    (lambda launch, n: product(launch, rows=n, columns=512, features=256), (1, 7, 16)),
    (lambda launch, n: experts(launch, tokens=n), (9, 100, 128)),
]


@pytest.mark.parametrize(("step", "sizes"), STEPS)
def test_a_steps_sizes_are_not_specialized(step, sizes):
    forms = set()
    for size in sizes:
        recorder = RecordingLauncher(TARGETS["sm_90"])
        step(recorder, size)
        launches = recorder.launches
        forms.add(tuple((each.name, tuple(sorted(each.options.items())), specialized(each)) for each in launches))
    assert len(forms) == 1


def specialized(launch):
    """Integers of which Triton's launcher would make a constant or an alignment."""
    return tuple(
        (parameter.name, value == 1, value % 16 == 0)
        for parameter in launch.kernel.params
        if isinstance(value := launch.arguments[parameter.name], int)
        and not parameter.is_constexpr
        and not parameter.do_not_specialize
    )
