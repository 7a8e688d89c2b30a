"""npu_top_k_top_p: logits of what is cut off become -inf. Source: _op_plugin_docs.py, npu_top_k_top_p."""

from __future__ import annotations

import torch
from torch import Tensor

from anychip_npu_simulator.calls import Arguments, simulates
from anychip_npu_simulator.ops.elementwise import floats

_MAX_K = 1024


def _check(a: Arguments) -> None:
    floats(a, "logits")
    a.dims("logits", 2)
    a.check(a.p is not None or a.k is not None, "p", "None, and k is None", "one of p and k, or both")
    rows = (a.logits.shape[0],)
    if a.p is not None:
        a.dtype("p", a.logits.dtype)
        a.shape("p", rows)
    if a.k is not None:
        a.dtype("k", torch.int32)
        a.shape("k", rows)


@simulates("npu_top_k_top_p", _check, "npu_top_k_top_p")
def top_k_top_p(a: Arguments) -> Tensor:
    """The steps of the document: ascending order, the k-th largest as threshold, then what of the cumulative
    probability is at most 1 - p is cut, never the largest."""
    values, order = a.logits.float().sort(dim=-1, stable=True)
    vocabulary = values.shape[1]
    if a.k is not None:
        k = a.k.long()
        low, high = int(k.min()), int(k.max())
        a.check(
            low >= 1 and high <= min(_MAX_K, vocabulary),
            "k",
            f"from {low} to {high}",
            f"1 to {min(_MAX_K, vocabulary)}",
        )
        threshold = values.gather(1, (vocabulary - k)[:, None])
        values = values.masked_fill(values < threshold, -torch.inf)
    if a.p is not None:
        cut = values.softmax(-1).cumsum(-1) <= 1 - a.p.float()[:, None]
        cut[:, -1] = False
        values = values.masked_fill(cut, -torch.inf)
    return torch.empty_like(values).scatter_(1, order, values).to(a.logits.dtype)
