"""State layers and latent attention: each kernel beside the plain reference that served before it, in turn.

python benchmarks/cpu/state_rates.py [--isa avx2] [--threads 1] [--rounds 5] [--processor-time] [--output FILE.json]

One layer each, bfloat16, in the shapes of Qwen3-Next, Mamba-2 (2.7B), Mamba (2.8B), Kimi Linear, MiniMax-01 and
DeepSeek-V2-Lite, and the indexer of DeepSeek-V3.2. Layers change from call to call, so that all comes from memory.
`of_bandwidth` is the share of the probed bandwidth that what must be moved takes: states twice, rows and factors
once. With --processor-time seconds are the processor's, of one thread, on a machine that others use too.
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
from kernel_rates import batch_of
from probe import bandwidth

from anychip.bench.report import write
from anychip.ops.reference import REFERENCE, ReferenceStates, SparseLatent, dense_part
from anychip.ops.table import resolve_ops
from anychip.plugin_api import (
    RECURRENCES,
    IndexInputs,
    LatentLayer,
    LatentSpec,
    PlatformContext,
    ProbeResult,
    ShapeKey,
    StateLayer,
    StateView,
    state_spec,
)
from anychip_cpu import MANIFEST, CpuOptions
from anychip_cpu.latent import CpuLatent
from anychip_cpu.platform import CpuPlatform

OPS = resolve_ops("cpu", {}).ops
STATES = {
    "causal_conv": {"channels": 8192, "past": 3, "width": 4},
    "gated_delta": {"heads": 32, "groups": 16, "key_dim": 128, "value_dim": 128},
    "ssd": {"heads": 80, "groups": 1, "head_dim": 64, "state_dim": 128},
    "selective_scan": {"channels": 5120, "state_dim": 16},
    "kda": {"heads": 32, "key_dim": 128, "value_dim": 128},
    "lightning": {"heads": 64, "key_dim": 96, "value_dim": 96},
}
STEPS = ((1, 1), (16, 1), (1, 512))
"""Rows, and tokens of each."""
Clock = Callable[[], float]
COLD = 96 << 20
"""Bytes that are gone through before any is read again."""


def medians(calls: dict[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, float]:
    """Seconds of each, in turn, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if number:
                found[name].append(clock() - began)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def row(kernel: str, shape: str, seconds: dict[str, float], nbytes: float, memory: float) -> dict[str, Any]:
    rate = nbytes / seconds["kernel"] / 1e9
    return {
        "kernel": kernel, "shape": shape, "seconds": seconds["kernel"], "reference_seconds": seconds["reference"],
        "speedup": seconds["reference"] / seconds["kernel"], "gb_s": rate, "of_bandwidth": rate / memory,
    }  # fmt: skip


# -- states -------------------------------------------------------------------------------------------------------


def states(platform: CpuPlatform, rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    for kind, dims in STATES.items():
        known = RECURRENCES[kind]
        named = {name for shape in known.arrays.values() for name in shape}
        spec = state_spec(kind, "bfloat16", **{name: dims[name] for name in named})
        weights = {name: drawn(name, shape, dims, known.wide) for name, shape in known.weights.items()}
        layer = StateLayer(index=0, ops=OPS, weights=weights)
        for rows, queries in STEPS:
            inputs = {
                name: drawn(name, shape, dims, known.wide, rows * queries) for name, shape in known.inputs.items()
            }
            view, calls, memory = view_of(rows, queries), {}, bandwidth(clock=clock)
            key = ShapeKey(
                num_tokens=rows * queries, num_reqs=rows, num_samples=rows, max_query_len=queries, num_pages=0
            )
            for name, backend in (("kernel", platform.state(spec)), ("reference", ReferenceStates(spec))):
                layers = max(1, min(32, COLD // (rows * backend.state_bytes()))) if queries == 1 else 1
                raw = [platform.allocate((rows + 1) * backend.state_bytes(), "states").zero_() for _ in range(layers)]
                caches = [backend.make_cache(each, rows + 1) for each in raw]
                calls[name] = through(backend, caches, inputs, backend.plan(view, key, group=0), layer)
            seconds = medians(calls, rounds, clock)
            nbytes = 2 * rows * sum(array.nbytes for array in spec.arrays)
            yield row(kind, f"{rows} rows of {queries}", seconds, nbytes, (memory + bandwidth(clock=clock)) / 2)


def through(backend: Any, caches: list[Any], inputs: Any, plan: Any, layer: StateLayer) -> Callable[[], Any]:
    """One call, of another cache each time."""
    at = iter(range(1 << 62))
    return lambda: backend.forward(inputs, caches[next(at) % len(caches)], plan, layer)


def drawn(name: str, shape: tuple[str, ...], dims: dict[str, int], wide: frozenset[str], *lead: int) -> torch.Tensor:
    dims = {"groups": dims.get("heads", 0), **dims}
    x = torch.randn(*lead, *(dims[dim] for dim in shape))
    if name in ("g", "a"):
        x = -x.abs() * 0.1
    elif name in ("dt", "slope"):
        x = x.abs() * 0.1
    elif name == "beta":
        x = x.sigmoid()
    return x if name in wide else x.bfloat16()


def view_of(rows: int, queries: int) -> StateView:
    counts = np.full(rows, queries)
    return StateView(
        query_start=torch.arange(0, (rows + 1) * queries, queries, dtype=torch.int32),
        seq_lens=torch.full((rows,), queries + 100, dtype=torch.int32),
        state_blocks=torch.arange(1, rows + 1, dtype=torch.int32),
        num_reqs=rows,
        num_tokens=rows * queries,
        max_query_len=queries,
        host_query_lens=counts,
    )


# -- latent attention -----------------------------------------------------------------------------------------------


def latents(platform: CpuPlatform, rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    spec = LatentSpec(
        num_heads=16, latent_dim=512, rope_dim=64, nope_dim=128, v_dim=128, dtype="bfloat16", kv_dtype="bfloat16"
    )
    for rows, length in ((1, 128), (1, 512), (1, 4096), (16, 512)):
        memory = bandwidth(clock=clock)
        backends = {"kernel": platform.latent(spec), "reference": CpuLatent(spec)}
        calls, _ = latent_calls(platform, spec, backends, rows, length)
        seconds = medians(calls, rounds, clock)
        held = rows * length * spec.row_dim + spec.num_heads * (spec.nope_dim + spec.v_dim) * spec.latent_dim
        yield row("latent", f"{rows} rows of 1 over {length}", seconds, 2 * held, (memory + bandwidth(clock=clock)) / 2)


def sparse(platform: CpuPlatform, rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    spec = LatentSpec(
        num_heads=16, latent_dim=512, rope_dim=64, nope_dim=128, v_dim=128, dtype="bfloat16", kv_dtype="bfloat16",
        index_dim=128, top_k=512,
    )  # fmt: skip
    for rows, length in ((1, 4096), (4, 4096)):
        memory = bandwidth(clock=clock)
        plain = SparseLatent(spec, CpuLatent(dense_part(spec)))
        calls, chosen = latent_calls(
            platform, spec, {"kernel": platform.latent(spec), "reference": plain}, rows, length
        )
        after = bandwidth(clock=clock)
        held = rows * spec.top_k * spec.row_dim + spec.num_heads * (spec.nope_dim + spec.v_dim) * spec.latent_dim
        of = f"{rows} rows of 1 over {length}"
        yield row("attend to 512", of, medians(calls, rounds, clock), 2 * held, (memory + after) / 2)
        yield row("choose 512", of, medians(chosen, rounds, clock), 2 * rows * length * 128, (memory + after) / 2)


def latent_calls(
    platform: CpuPlatform, spec: LatentSpec, backends: dict[str, Any], rows: int, length: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """By backend: forward, and where there are index keys choose; of another layer each time."""
    batch, blocks = batch_of(rows, 1, length)
    key = ShapeKey(num_tokens=rows, num_reqs=rows, num_samples=rows, max_query_len=1, num_pages=0)
    given = [
        torch.randn(rows, *shape).bfloat16()
        for shape in ((16, spec.nope_dim), (16, spec.rope_dim), (spec.latent_dim,), (spec.rope_dim,))
    ]
    index = IndexInputs(
        queries=torch.randn(rows, 64, 128).bfloat16(), keys=torch.randn(rows, 128).bfloat16(),
        weights=torch.randn(rows, 64),
    )  # fmt: skip
    layers = [
        LatentLayer(
            index=0, scale=0.07, ops=OPS, k_up=torch.randn(16, spec.nope_dim, 512).bfloat16() * 0.05,
            v_up=torch.randn(16, spec.v_dim, 512).bfloat16() * 0.05,
        )
        for _ in range(8)
    ]  # fmt: skip
    attends, chooses = {}, {}
    for name, backend in backends.items():
        plan = backend.plan(batch, key, group=0)
        page = backend.kv_layout().page_bytes(16)
        caches = []
        for _ in range(max(2, min(8, COLD // (blocks * page)))):
            raw = platform.allocate(blocks * page, "kv")
            raw.view(torch.bfloat16).normal_()
            caches.append(backend.make_cache(raw, blocks, 16))
        chosen = backend.choose(index, caches[0], plan, layers[0])[0] if spec.index_dim else None
        at = iter(range(1 << 62))

        def attend(
            backend: Any = backend, plan: Any = plan, caches: Any = caches, at: Any = at, c: Any = chosen
        ) -> Any:
            number = next(at)
            return backend.forward(*given, caches[number % len(caches)], plan, layers[number % len(layers)], chosen=c)

        def choose(backend: Any = backend, plan: Any = plan, caches: Any = caches, at: Any = at) -> Any:
            return backend.choose(index, caches[next(at) % len(caches)], plan, layers[0])

        attends[name], chooses[name] = attend, choose
    return attends, chooses


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    options = CpuOptions(isa=arguments.isa, threads=arguments.threads)
    platform = CpuPlatform(
        PlatformContext(
            manifest=MANIFEST, device_indexes=(0,), options=options, probe=ProbeResult(), reference=REFERENCE
        )
    )
    clock = time.thread_time if arguments.processor_time else time.perf_counter
    rows = []
    for section in (states, latents, sparse):
        for each in section(platform, arguments.rounds, clock):
            rows.append(each)
            print(
                f"{each['kernel']:16} {each['shape']:24} {1e6 * each['seconds']:9.0f} us, "
                f"{each['speedup']:6.1f} times the reference, {each['gb_s']:6.1f} GB/s ({each['of_bandwidth']:.0%})",
                flush=True,
            )
    if arguments.output:
        write(
            arguments.output,
            {
                "isa": platform.isa, "threads": arguments.threads, "torch": torch.__version__,
                "seconds_of": "the processor" if arguments.processor_time else "the clock", "kernels": rows,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
