"""Where attention reads and writes: padding, strides, far blocks, quantized caches, rotary on the way in."""

from __future__ import annotations

from hypothesis import strategies as st

from anychip_conformance.attention_cases import DECODE, RAGGED, drawn, rows
from anychip_conformance.case import kind
from anychip_conformance.choices import each_dtype
from anychip_conformance.device import Device
from anychip_conformance.paged import AttentionCase
from anychip_conformance.paged_judge import check_attention


@kind(
    "attn.padding",
    corpus=[
        AttentionCase(rows=RAGGED, pad_tokens=5),
        AttentionCase(rows=DECODE, pad_tokens=3, pad_rows=3, guarded=True),
        AttentionCase(rows=rows((0, 0, 3)), pad_tokens=1, guarded=True, dtype="narrow"),
        AttentionCase(rows=rows((0, 0, 0), (1, 0, 2), (0, 0, 0), (0, 3, 1)), pad_rows=1, guarded=True),
    ],
)
def padding(device: Device, case: AttentionCase) -> None:
    """Padded rows come back as zeros, are written nowhere, and nothing is written past the output's ends."""
    check_attention(device, case)


@kind(
    "attn.strides",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, strided=True),
        AttentionCase(rows=rows((1, 0, 1)), strided=True, num_heads=4, num_kv_heads=1),
    ),
    quick=3,
)
def strides(device: Device, case: AttentionCase) -> None:
    """q, k and v may be slices of one packed projection; none of them is changed."""
    check_attention(device, case)


@kind(
    "attn.far_blocks",
    corpus=[
        AttentionCase(rows=rows((1, 1, 1), (0, 2, 3)), far=True, dtype="narrow", head_dim=64),
        AttentionCase(
            rows=rows(
                (1, 3, 1),
            ),
            far=True,
            dtype="float32",
            head_dim=64,
        ),
    ],
)
def far_blocks(device: Device, case: AttentionCase) -> None:
    """Block ids whose offset does not fit 32 bits."""
    check_attention(device, case)


@kind(
    "attn.kv_quantized",
    profile="quantization",
    corpus=[
        AttentionCase(rows=shape, kv=kv, dtype=dtype, head_scales=per_head)  # type: ignore[arg-type]
        for kv in ("fp8", "int8")
        for dtype in ("any", "narrow")
        for shape, per_head in ((RAGGED, False), (DECODE, True))
    ],
    drawn=drawn(kv=st.sampled_from(["fp8", "int8"]), head_scales=st.booleans()),
)
def kv_quantized(device: Device, case: AttentionCase) -> None:
    """A cache of one byte a value: the layer's scales on the way in and out, saturation instead of NaN."""
    check_attention(device, case)


@kind(
    "attn.rotary",
    corpus=each_dtype(
        AttentionCase(rows=RAGGED, rope="neox"),
        AttentionCase(rows=RAGGED, rope="interleaved"),
        AttentionCase(rows=DECODE, rope="neox", rotary_fraction=0.5, head_dim=32),
        AttentionCase(rows=RAGGED, rope="neox", qk_norm=True, pad_tokens=2),
        AttentionCase(rows=DECODE, rope="none", qk_norm=True),
    ),
    drawn=drawn(
        rope=st.sampled_from(["none", "neox", "interleaved"]),
        rotary_fraction=st.sampled_from([1.0, 0.5, 0.25]),
        qk_norm=st.booleans(),
    ),
)
def rotary(device: Device, case: AttentionCase) -> None:
    """Norm of queries and keys, then rotary at each token's own position; keys rest rotated in the cache."""
    check_attention(device, case)


@kind("attn.read_only", corpus=each_dtype(AttentionCase(rows=RAGGED, read_only=True)), drawn=drawn(read_only=True))
def read_only(device: Device, case: AttentionCase) -> None:
    """k and v None: the layer attends over what another layer wrote, and writes nothing."""
    check_attention(device, case)
