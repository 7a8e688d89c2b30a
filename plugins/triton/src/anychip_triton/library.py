"""Dense products of the vendor's library, by way of torch, whose sums are of float32 from the first to the last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_SWITCHES = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
_SPLITS = "_split_k"
"""Behind a switch's name: whether columns may be divided at all. Earlier versions of torch do not have it."""


@contextlib.contextmanager
def float32_sums(dtype: torch.dtype) -> Iterator[None]:
    """Where a product has few tiles, the library divides its columns, and by torch's default adds the parts' sums in
    the result's own dtype: 17 rows by 1,024 columns in bfloat16 were off by five units in the last place. The switch is
    the whole process's, in which others may use torch: it stands as it stood when this ends."""
    name = _SWITCHES.get(dtype)
    if name is None:
        yield
        return
    switches = torch.backends.cuda.matmul
    allowed, splits = getattr(switches, name), getattr(switches, name + _SPLITS, None)
    setattr(switches, name, False if splits is None else (False, splits))
    try:
        yield
    finally:
        setattr(switches, name, allowed if splits is None else (allowed, splits))


def library_product(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    with float32_sums(x.dtype):
        if out is None:
            return F.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.T, out=out)
        return torch.addmm(bias, x, weight.T, out=out)
