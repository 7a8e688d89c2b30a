"""Products of the vendor's library add in float32, and leave torch's switches as they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from anychip_triton.library import library_product

SWITCHES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def stand() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cuda.matmul, name) for name in SWITCHES)


def set_to(wanted: tuple[bool, ...]) -> None:
    for name, allowed in zip(SWITCHES, wanted, strict=True):
        setattr(torch.backends.cuda.matmul, name, allowed)


@pytest.fixture(params=[(True, True), (False, True), (True, False)])
def before(request):
    found = stand()
    set_to(request.param)
    yield request.param
    set_to(found)


@pytest.mark.parametrize(
    ("dtype", "within"),
    [(torch.bfloat16, (False, None)), (torch.float16, (None, False)), (torch.float32, (None, None))],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_sums_are_of_float32_within_and_switches_stand_as_they_stood(before, monkeypatch, dtype, within, bias, into):
    seen = []
    for owner, name in ((F, "linear"), (torch, "mm"), (torch, "addmm")):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, run=run, **k: (seen.append(stand()), run(*a, **k))[1])
    x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    added = torch.randn(5, dtype=dtype) if bias else None
    out = torch.empty(3, 5, dtype=dtype) if into else None
    result = library_product(x, weight, added, out=out)
    wanted = tuple(old if new is None else new for old, new in zip(before, within, strict=True))
    assert seen == [wanted] and stand() == before
    expected = x.double() @ weight.double().T + (added.double() if bias else 0)
    torch.testing.assert_close(result.double(), expected, rtol=2e-2, atol=2e-2)
    assert out is None or result.data_ptr() == out.data_ptr()


def test_switches_stand_as_they_stood_after_an_error(before):
    with pytest.raises(RuntimeError):
        library_product(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16), None)
    assert stand() == before
