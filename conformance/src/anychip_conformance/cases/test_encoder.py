"""Encoder attention: rows are whole sequences without padding between them, and their tokens all see each other."""

from __future__ import annotations

import msgspec
import numpy as np

from anychip.plugin_api import EncoderLayer, EncoderSpec, EncoderView, ShapeKey
from anychip_conformance.case import kind
from anychip_conformance.choices import CaseDtype, each_dtype
from anychip_conformance.device import Device, seen, unchanged
from anychip_conformance.oracle.attention import attention_row


class EncoderCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`window` to each side; `reach` of a bias by distance, 0: there is none."""

    lengths: tuple[int, ...]
    dtype: CaseDtype = "any"
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    any_head_dim: bool = True
    window: int | None = None
    reach: int = 0
    pad_tokens: int = 0
    pad_rows: int = 0
    seed: int = 0

    @property
    def spec(self) -> EncoderSpec:
        return EncoderSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            window=self.window,
            bias=self.reach > 0,
        )


MIXED = (5, 17, 1, 40, 5, 3)


@kind(
    "encoder.attend",
    corpus=[
        EncoderCase(lengths=MIXED),
        EncoderCase(lengths=MIXED, window=4),
        EncoderCase(lengths=MIXED, reach=8),
        EncoderCase(lengths=MIXED, reach=3, window=9),
        EncoderCase(lengths=MIXED, num_kv_heads=2, pad_tokens=5, pad_rows=2),
        EncoderCase(lengths=(7, 7, 7), window=2, seed=1),
        *each_dtype(EncoderCase(lengths=(1, 130, 64), head_dim=64)),
        EncoderCase(lengths=(512,), num_heads=2, num_kv_heads=2),
    ],
)
def attend(device: Device, case: EncoderCase) -> None:
    """Every token sees all tokens of its own sequence, as far as its window goes, and none of another's; a bias goes by
    the key's place minus the query's. Padding is finite."""
    device.need_dtype(case.dtype)
    device.need("encoders", device.capabilities.encoders, lambda: device.platform.encoder(case.spec))
    backend, rng = device.platform.encoder(case.spec), np.random.default_rng(case.seed)
    view, key = encoder_view(device, case)
    q, k, v = (
        device.tensor(rng.normal(size=(key.num_tokens, heads, case.head_dim)), case.dtype)
        for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    )
    table = rng.normal(size=(case.num_heads, 2 * case.reach + 1)).astype(np.float32)
    layer = EncoderLayer(
        index=0,
        scale=case.head_dim**-0.5,
        ops=device.ops.ops,
        bias=device.held(table, "float32") if case.reach else None,
    )
    same = unchanged(device, {"q": q, "k": k, "v": v})
    result = backend.forward(q, k, v, backend.plan(view, key, group=0), layer)
    same()
    shape = (key.num_tokens, case.num_heads, case.head_dim)
    assert tuple(result.shape) == shape, f"the output has shape {tuple(result.shape)}, expected {shape}"
    assert str(result.dtype) == f"torch.{case.dtype}", f"the output is {result.dtype}"
    at = 0
    for index, length in enumerate(case.lengths):
        mine = slice(at, at + length)
        places = np.arange(length)
        distance = np.clip(places - places[:, None], -case.reach, case.reach)
        expected = attention_row(
            seen(q[mine]),
            seen(k[mine]),
            seen(v[mine]),
            scale=layer.scale,
            dtype=case.dtype,
            window=case.window,
            causal=False,
            bias=table[:, distance + case.reach].astype(np.float64) if case.reach else None,
        ).out
        device.compare(f"row {index}", result[mine], expected, label=f"encoder/{case.dtype}")
        at += length
    assert np.isfinite(seen(result[at:])).all(), "padded tokens hold numbers that are not finite"


def encoder_view(device: Device, case: EncoderCase) -> tuple[EncoderView, ShapeKey]:
    num_tokens, num_rows = sum(case.lengths), len(case.lengths)
    key = ShapeKey(
        num_tokens=num_tokens + case.pad_tokens,
        num_reqs=num_rows + case.pad_rows,
        num_samples=1,
        max_query_len=max(case.lengths),
        num_pages=1,
    )
    starts = np.full(key.num_reqs + 1, num_tokens)
    starts[: num_rows + 1] = np.concatenate(([0], np.cumsum(case.lengths)))
    positions = np.concatenate([*map(np.arange, case.lengths), np.zeros(case.pad_tokens)])
    view = EncoderView(
        query_start=device.tensor(starts, "int32"),
        positions=device.tensor(positions, "int32"),
        num_reqs=key.num_reqs,
        num_tokens=key.num_tokens,
        max_query_len=max(case.lengths),
        host_query_lens=np.asarray(case.lengths, dtype=np.int32),
    )
    return view, key
