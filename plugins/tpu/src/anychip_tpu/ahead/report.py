"""What a command shows: a table for people, or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anychip.plugin_api import ShapeKey
from anychip_tpu.ahead.compiler import Compiled, gib
from anychip_tpu.ahead.estimate import Estimate
from anychip_tpu.ahead.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One program. `compiled` and `estimate` are None where it does not compile: then `reason` says why."""

    key: ShapeKey
    reason: str = ""
    compiled: Compiled | None = None
    estimate: Estimate | None = None

    def fits(self, topology: Topology) -> bool:
        return self.compiled is not None and self.compiled.hbm_bytes <= topology.generation.hbm_bytes_per_device


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceReport:
    topology: Topology
    libtpu: str
    problems: Sequence[str] = ()
    weight_bytes: float = 0.0  # of one device
    num_blocks: int = 0
    block_size: int = 0
    context: int = 0
    buckets: Sequence[Bucket] = ()

    @property
    def good(self) -> bool:
        return not self.problems and all(bucket.fits(self.topology) for bucket in self.buckets)


def as_json(model: str, report: SliceReport) -> dict[str, Any]:
    topology = report.topology
    return {
        "model": model,
        "topology": str(topology),
        "devices": topology.num_devices,
        "hbm_bytes_per_device": topology.generation.hbm_bytes_per_device,
        "libtpu": report.libtpu,
        "evidence": "compiles",
        "problems": list(report.problems),
        "weight_bytes_per_device": int(report.weight_bytes),
        "kv_blocks": report.num_blocks,
        "block_size": report.block_size,
        "context": report.context,
        "buckets": [_bucket_json(bucket, topology) for bucket in report.buckets],
    }


def _bucket_json(bucket: Bucket, topology: Topology) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokens": bucket.key.num_tokens,
        "rows": bucket.key.num_reqs,
        "samples": bucket.key.num_samples,
        "pages": bucket.key.num_pages,
        "compiles": bucket.compiled is not None,
    }
    if bucket.compiled is None or bucket.estimate is None:
        return {**found, "reason": bucket.reason}
    compiled, estimate = bucket.compiled, bucket.estimate
    return {
        **found,
        "fits": bucket.fits(topology),
        "seconds_to_compile": round(compiled.seconds, 2),
        "hbm_bytes": compiled.hbm_bytes,
        "temporary_bytes": compiled.temporary_bytes,
        "code_bytes": compiled.code_bytes,
        "alias_bytes": compiled.alias_bytes,
        "flops": compiled.flops,
        "collective_bytes": compiled.collective_bytes,
        "pallas_kernels": compiled.num_kernels,
        "estimate_s": estimate.seconds,
        "estimate_bound": estimate.bound,
    }


def show(model: str, report: SliceReport, console: Console) -> None:
    topology = report.topology
    have = topology.generation.hbm_bytes_per_device
    console.print(f"[bold]{escape(model)}[/] for {topology}, {topology.num_devices} devices, libtpu {report.libtpu}")
    for problem in report.problems:
        console.print(f"  cannot run: {escape(problem)}")
    if not report.buckets:
        return
    console.print(
        f"  of each device: weights {gib(report.weight_bytes)}, KV cache {report.num_blocks} blocks of "
        f"{report.block_size} tokens"
    )
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("tokens", "rows", "compiles", f"HBM of {gib(have)}", "step's values", "GFLOP", "kernels", "at least"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for bucket in report.buckets:
        table.add_row(*_row(bucket, topology))
    console.print(table)
    console.print(
        f"  The last column is a roofline of the vendor's peaks with {report.context} keys in each row's past; nothing "
        "ran."
    )
    for bucket in report.buckets:
        if bucket.reason:
            console.print(f"  {bucket.key.num_tokens} tokens: {escape(bucket.reason)}")


def _row(bucket: Bucket, topology: Topology) -> list[str]:
    size = [str(bucket.key.num_tokens), str(bucket.key.num_reqs)]
    if bucket.compiled is None or bucket.estimate is None:
        return [*size, "[red]no[/]", "", "", "", "", ""]
    compiled, estimate = bucket.compiled, bucket.estimate
    fits = "yes" if bucket.fits(topology) else "[red]over HBM[/]"
    return [
        *size,
        f"{fits}, {compiled.seconds:.0f} s",
        gib(compiled.hbm_bytes),
        gib(compiled.temporary_bytes),
        f"{compiled.flops / 1e9:.0f}",
        str(compiled.num_kernels),
        f"{estimate.seconds * 1e3:.2f} ms ({estimate.bound})",
    ]
