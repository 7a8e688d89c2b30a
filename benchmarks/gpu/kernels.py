"""Kernels of one decode and one prefill step, each beside torch's own, with its share of the device's limits.

Measured on the device, by first_hour.py. A limit is the larger of two times: the bytes that a kernel cannot but move,
over what a copy moves in a second, and its operations, over those of a large matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from anychip_triton.launch import JitLauncher
from anychip_triton.linear import WIDENED_ROWS
from anychip_triton.problems import FP8, INT4, INT8, attention, drawing, elementwise, experts, product
from anychip_triton.timing import KeepingLauncher, device_ms

_LAYERS = {
    "qwen-0.5b": {"heads": 14, "kv_heads": 2, "dim": 64},
    "llama-8b": {"heads": 32, "kv_heads": 8, "dim": 128},
    "qwen-30b-a3b": {"heads": 32, "kv_heads": 4, "dim": 128, "qk_norm": True},
}
_PRODUCTS = {
    "0.5b qkv": (896, 1152), "0.5b out": (896, 896), "0.5b gate and up": (896, 9728), "0.5b down": (4864, 896),
    "8b qkv": (4096, 6144), "8b out": (4096, 4096), "8b gate and up": (4096, 28672), "8b down": (14336, 4096),
    "30b qkv": (2048, 5120), "30b out": (4096, 2048), "30b router": (2048, 128), "0.5b head": (896, 151936),
}  # fmt: skip
"""Columns and features."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A problem of anychip_triton.problems, what it must move and do, and what torch has for the same."""

    name: str
    problem: Callable[..., None]
    nbytes: float = 0.0
    operations: float = 0.0
    torchs: Callable[[], object] | None = None
    ends_with_torchs: bool = False
    """Whether the vendor's library finishes the work: its part is not among the problem's launches."""


def measured() -> Iterator[Measured]:
    for name, layer in _LAYERS.items():
        for rows, context in ((1, 1024), (8, 512), (32, 512), (128, 512), (1, 32768)):
            yield _decode(name, layer, rows, context)
        for rows, queries in ((4, 512), (1, 8192)):
            yield _prefill(name, layer, rows, queries)
    for rows in (1, 8, 16):
        for name, (columns, features) in _PRODUCTS.items():
            yield _product(name, rows, columns, features)
    for scheme, size in ((INT4, 0.5), (INT8, 1), (FP8, 1)):
        for rows in (1, 16, 64, 512, 4096):
            yield _product("8b gate and up", rows, 4096, 28672, scheme=scheme, size=size)
    for tokens in (1, 8, 32, 128, 512, 4096):
        yield _experts(tokens)
    for tokens in (8, 4096):
        yield _experts(tokens, INT4, 0.5)
    yield Measured("norms, activations, embedding", elementwise)
    yield Measured("edits, masks and draws of 8 rows", drawing)


def _decode(name: str, layer: dict[str, Any], rows: int, context: int) -> Measured:
    nbytes = 2 * 2 * rows * context * layer["kv_heads"] * layer["dim"]
    problem = partial(attention, **layer, rows=rows, queries=1, context=context)
    return Measured(f"{name}: attention of {rows} x {context}", problem, nbytes=nbytes)


def _prefill(name: str, layer: dict[str, Any], rows: int, queries: int) -> Measured:
    heads, dim = layer["heads"], layer["dim"]
    q, k, v = (
        torch.randn(rows, count, queries, dim, dtype=torch.bfloat16, device="cuda")
        for count in (heads, layer["kv_heads"], layer["kv_heads"])
    )
    return Measured(
        f"{name}: prompts of {rows} x {queries}",
        partial(attention, **layer, rows=rows, queries=queries, context=queries),
        operations=4 * rows * heads * dim * queries * queries / 2,
        torchs=partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True),
    )


def _product(name: str, rows: int, columns: int, features: int, scheme: Any = None, size: float = 2) -> Measured:
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(features, columns, dtype=torch.bfloat16, device="cuda")
    return Measured(
        f"{scheme.name if scheme else 'bf16'} product, {name}, {rows} rows",
        partial(product, rows=rows, columns=columns, features=features, scheme=scheme),
        nbytes=columns * features * size + 2 * rows * (columns + features),
        operations=2 * rows * columns * features,
        torchs=partial(F.linear, x, weight),
        ends_with_torchs=scheme is not None and rows > WIDENED_ROWS.get(scheme.name, rows),
    )


def _experts(tokens: int, scheme: Any = None, size: float = 2) -> Measured:
    pairs, width = 8 * tokens, 3 * 768 * 2048
    met = 128 * (1 - (1 - 8 / 128) ** tokens)  # experts of random routing
    return Measured(
        f"{scheme.name if scheme else 'bf16'} experts of {tokens} tokens",
        partial(experts, tokens=tokens, scheme=scheme),
        nbytes=size * met * width + 4 * 2048 * tokens,
        operations=2 * pairs * width,
    )


def compile_all(launch: JitLauncher, place: str) -> None:
    """Side by side, before anything is timed."""
    with launch.rehearsal():
        for case in measured():
            case.problem(launch, place)


def timed(case: Measured, launch: JitLauncher, place: str, found: dict[str, float]) -> dict[str, Any]:
    """ms of all the problem's launches and of each kernel, the limit and torch's; `found` as `limits` gives it."""
    keeping = KeepingLauncher(launch.target, launch.tiles)
    case.problem(keeping, place)

    def work() -> None:
        keeping.again()
        if case.ends_with_torchs and case.torchs is not None:
            case.torchs()

    result: dict[str, Any] = {"ms": device_ms(work)} if keeping.kept else {}
    if len(keeping.kept) > 1:
        result["kernels_ms"] = [[name, device_ms(again)] for name, again in keeping.kept]
    limit = max(case.nbytes / found["bytes_per_s"], case.operations / found["operations_per_s"])
    if limit:
        result["limit_ms"] = 1e3 * limit
    if case.torchs is not None:
        result["torch_ms"] = device_ms(case.torchs)
    return result
