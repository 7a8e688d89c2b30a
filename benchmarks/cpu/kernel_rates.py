"""What each kernel reaches of what the machine gives: memory as our probe reads it, arithmetic as torch's own bfloat16
product does it.

python benchmarks/cpu/kernel_rates.py [--isa avx2] [--output FILE.json]

Weights are larger than the caches and change from call to call, as layers do. `share` is of the bandwidth probed beside
it for products of a few rows, and of torch's product for the others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from probe import bandwidth

from anychip.bench.report import write
from anychip.ops.reference import REFERENCE
from anychip.ops.table import resolve_ops
from anychip.plugin_api import (
    AttentionLayer,
    AttentionSpec,
    BatchView,
    LinearPart,
    LinearSpec,
    MoESpec,
    PlatformContext,
    ProbeResult,
    QuantScheme,
    ShapeKey,
)
from anychip_cpu import MANIFEST, CpuOptions
from anychip_cpu.platform import CpuPlatform
from anychip_cpu.probe import available_cores

COLD = 256 << 20
"""Bytes of weights that are gone through before any is read again."""


def seconds(fn: Callable[[], Any], repeats: int = 7) -> float:
    fn()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        fn()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def torch_rate() -> float:
    """GFLOP/s of torch's bfloat16 product on every core, at 1,024 x 2,048 x 8,192."""
    x, w = torch.randn(1024, 2048).bfloat16(), torch.randn(8192, 2048).bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(available_cores())
    taken = seconds(lambda: torch.nn.functional.linear(x, w), 5)
    torch.set_num_threads(threads)
    return 2 * 1024 * 2048 * 8192 / taken / 1e9


def products(platform: CpuPlatform, peak: float) -> Iterator[dict[str, Any]]:
    int4 = QuantScheme(values="int4", scales="group", group_size=128)
    int8 = QuantScheme(values="int8", scales="channel")
    w8a8 = QuantScheme(values="int8", scales="channel", activations="token")
    for name, scheme, bits in (("bf16", None, 16), ("int8", int8, 8), ("int4", int4, 4), ("w8a8", w8a8, 8)):
        for rows, columns in ((16384, 2048), (2048, 8192)) if scheme else ((16384, 2048), (2048, 8192), (9728, 896)):
            spec = LinearSpec(
                in_features=columns, out_features=rows, dtype="bfloat16", scheme=scheme,
                parts=(LinearPart(name="all", offset=0, rows=rows),),
            )  # fmt: skip
            kernel = platform.linear(spec)
            nbytes = rows * columns * bits // 8
            layers = [filled(kernel, spec) for _ in range(max(1, COLD // nbytes))]
            for tokens in (1, 4, 16, 2048):
                x = torch.randn(tokens, columns).bfloat16()
                used = layers if tokens < 64 else layers[:1]

                def run(used: list = used, x: torch.Tensor = x, kernel: Any = kernel) -> None:
                    for packed in used:
                        kernel.apply(x, packed)

                before = bandwidth()
                taken = seconds(run, 7 if tokens < 64 else 3) / len(used)
                memory = (before + bandwidth()) / 2
                rate, flops = nbytes / taken / 1e9, 2 * tokens * rows * columns / taken / 1e9
                yield {
                    "kernel": f"product {name}", "shape": f"{tokens} x {columns} x {rows}", "seconds": taken,
                    "gb_s": rate, "gflop_s": flops, "of_bandwidth": rate / memory, "of_torch": flops / peak,
                }  # fmt: skip


def filled(kernel: Any, spec: LinearSpec) -> Any:
    packed = kernel.begin()
    rows, columns, scheme = spec.out_features, spec.in_features, spec.scheme
    if scheme is None:
        kernel.load(packed, "all", torch.randn(rows, columns).bfloat16())
    else:
        groups = columns // scheme.group_size if scheme.group_size else 1
        low, high, dtype = (0, 16, torch.uint8) if scheme.values == "int4" else (-127, 128, torch.int8)
        kernel.load(packed, "all", torch.randint(low, high, (rows, columns), dtype=dtype))
        kernel.load(packed, "all.scale", torch.rand(rows, groups) if scheme.group_size else torch.rand(rows))
    return kernel.finish(packed)


def mixtures(platform: CpuPlatform, peak: float) -> Iterator[dict[str, Any]]:
    spec = MoESpec(num_experts=32, top_k=4, hidden_size=1024, intermediate_size=512, dtype="bfloat16")
    kernel = platform.moe(spec)
    layers = []
    for _ in range(3):
        packed = kernel.begin()
        for expert in range(spec.num_experts):
            for part, shape in (("gate", (512, 1024)), ("up", (512, 1024)), ("down", (1024, 512))):
                kernel.load(packed, expert, part, torch.randn(shape).bfloat16() * 0.02)
        layers.append(kernel.finish(packed))
    for tokens in (1, 16, 2048):
        x = torch.randn(tokens, 1024).bfloat16()
        routing = kernel.route(torch.randn(tokens, 32))
        active = len(routing.expert_ids.unique())

        def run(x: torch.Tensor = x, routing: Any = routing) -> None:
            for packed in layers:
                kernel.experts(x, routing, packed)

        before = bandwidth()
        taken = seconds(run, 7 if tokens < 64 else 3) / len(layers)
        memory = (before + bandwidth()) / 2
        nbytes, flops = active * 3 * 1024 * 512 * 2, 2 * tokens * 4 * 3 * 1024 * 512
        yield {
            "kernel": "experts bf16", "shape": f"{tokens} tokens, {active} of 32 experts", "seconds": taken,
            "gb_s": nbytes / taken / 1e9, "gflop_s": flops / taken / 1e9,
            "of_bandwidth": nbytes / taken / 1e9 / memory, "of_torch": flops / taken / 1e9 / peak,
        }  # fmt: skip


def attentions(platform: CpuPlatform, peak: float) -> Iterator[dict[str, Any]]:
    for heads, kv_heads in ((32, 8), (14, 2), (16, 4)):
        for rows, queries, length in ((1, 2048, 2048), (1, 1, 2048), (16, 1, 2048), (16, 1, 512)):
            spec = AttentionSpec(
                num_heads=heads, num_kv_heads=kv_heads, head_dim=64, dtype="bfloat16", kv_dtype="bfloat16"
            )
            backend = platform.attention(spec)
            batch, blocks = batch_of(rows, queries, length)
            raw = platform.allocate(blocks * backend.kv_layout().page_bytes(16), "kv")
            cache = backend.make_cache(raw, blocks, 16)
            layer = AttentionLayer(index=0, scale=0.125, ops=resolve_ops("cpu", {}).ops)
            tensors = [torch.randn(batch.num_tokens, n, 64).bfloat16() for n in (heads, kv_heads, kv_heads)]
            key = ShapeKey(
                num_tokens=batch.num_tokens, num_reqs=rows, num_samples=rows, max_query_len=queries, num_pages=0
            )
            plan = backend.plan(batch, key, group=0)
            before = bandwidth()
            taken = seconds(lambda: backend.forward(*tensors, cache, plan, layer))  # noqa: B023
            memory = (before + bandwidth()) / 2
            seen = rows * sum(range(length - queries + 1, length + 1))
            flops, nbytes = 4 * heads * 64 * seen, rows * length * kv_heads * 64 * 4
            yield {
                "kernel": "attention bf16",
                "shape": f"{rows} rows of {queries} over {length}, {heads}/{kv_heads} heads",
                "seconds": taken,
                "gb_s": nbytes / taken / 1e9,
                "gflop_s": flops / taken / 1e9,
                "of_bandwidth": nbytes / taken / 1e9 / memory,
                "of_torch": flops / taken / 1e9 / peak,
            }  # fmt: skip


def batch_of(rows: int, queries: int, length: int) -> tuple[BatchView, int]:
    pages = -(-length // 16)
    table = np.random.default_rng(0).permutation(rows * pages).astype(np.int32).reshape(rows, pages) + 1
    positions = np.tile(np.arange(length - queries, length), rows)
    slots = table.repeat(queries, axis=0)[np.arange(rows * queries), positions // 16] * 16 + positions % 16
    starts = np.arange(rows + 1) * queries
    return BatchView(
        query_start=torch.from_numpy(starts.astype(np.int32)),
        seq_lens=torch.full((rows,), length, dtype=torch.int32),
        block_table=torch.from_numpy(table),
        slot_mapping=torch.from_numpy(slots.astype(np.int64)),
        positions=torch.from_numpy(positions.astype(np.int64)),
        num_reqs=rows,
        num_tokens=rows * queries,
        max_query_len=queries,
        block_size=16,
        host_query_lens=np.diff(starts),
        host_seq_lens=None,
        host_exact=False,
    ), 1 + rows * pages


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default="")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    platform = CpuPlatform(
        PlatformContext(
            manifest=MANIFEST, device_indexes=(0,), options=CpuOptions(isa=arguments.isa), probe=ProbeResult(),
            reference=REFERENCE,
        )
    )  # fmt: skip
    peak, rows = torch_rate(), []
    for section in (products, mixtures, attentions):
        for row in section(platform, peak):
            rows.append(row)
            print(
                f"{row['kernel']:16} {row['shape']:44} {row['gb_s']:7.1f} GB/s ({row['of_bandwidth']:.0%})"
                f" {row['gflop_s']:7.0f} GFLOP/s ({row['of_torch']:.0%})",
                flush=True,
            )
    if arguments.output:
        write(arguments.output, {"isa": platform.isa, "torch_gflop_s": peak, "kernels": rows})


if __name__ == "__main__":
    main()
