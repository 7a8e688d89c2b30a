"""How fast weights are read, and how much memory that takes: each load in a process of its own.

python benchmarks/loading.py CHECKPOINT [--repeats 5] [--cold] [--quantization int8] [--output FILE.json]

The page cache is warm, or emptied of the checkpoint before each read with --cold. `peak_over_size` is the process's
most resident memory during the load, less what it held before, over the bytes of the checkpoint; `copy_gb_s` is what
the machine copies in memory before it, and `touch_gb_s` how fast it writes to memory that was never written to,
which every loaded byte must be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from anychip.bench.report import write


def load_once(folder: str, quantization: str | None) -> dict[str, float]:
    """In this process: builds the model on the CPU plugin and reads its weights."""
    import torch

    from anychip.config import EngineConfig
    from anychip.model_config import load_model_config
    from anychip.ops.table import resolve_ops
    from anychip.plugin_api import Mesh, ProbeResult
    from anychip.registry.plugins import load_plugins
    from anychip.worker.model_source import CheckpointSource
    from anychip.worker.open_platform import open_platform

    manifest = load_plugins().platforms["cpu"]
    platform = open_platform(manifest, device_indexes=(0,), options=manifest.options(), probe=ProbeResult())
    source = CheckpointSource(
        config=EngineConfig(model=folder, device="cpu", quantization=quantization),
        model=load_model_config(folder),
        platform=platform,
        ops=resolve_ops("cpu", platform.ops()),
        contributed={},
    )
    models = []
    warm = torch.empty(64 << 20, dtype=torch.uint8)  # torch's own first-use costs are not the loader's
    copy = copy_rate(warm)
    del warm
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    touch = touch_rate(size)
    began = time.perf_counter()
    peak = platform.measure(lambda: models.append(source.build(Mesh.alone())))
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "gb_s": size / seconds / 1e9,
        "peak_over_size": peak.nbytes / size,
        "held_over_size": source.held_bytes / size,
        "copy_gb_s": copy,
        "touch_gb_s": touch,
    }


def copy_rate(buffer) -> float:
    """GB/s at which one thread copies a buffer."""
    began = time.perf_counter()
    for _ in range(4):
        buffer.clone()
    return 4 * buffer.nbytes / (time.perf_counter() - began) / 1e9


def touch_rate(nbytes: int) -> float:
    """GB/s at which fresh memory of the checkpoint's size is first written: no loader can be faster."""
    import torch

    began = time.perf_counter()
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    return nbytes / (time.perf_counter() - began) / 1e9


def read_rate(folder: str) -> float:
    """GB/s at which one thread reads the files into one buffer."""
    buffer, total, began = bytearray(16 << 20), 0, time.perf_counter()
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - began) / 1e9


def forget(folder: str) -> None:
    """Empties the page cache of the checkpoint."""
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quantization")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--once", action="store_true", help="one load in this process, as JSON")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(load_once(arguments.checkpoint, arguments.quantization)))
        return
    command = [sys.executable, __file__, arguments.checkpoint, "--once"]
    command += ["--quantization", arguments.quantization] if arguments.quantization else []
    read_rate(arguments.checkpoint)  # warms the page cache
    runs = []
    for _ in range(arguments.repeats):
        if arguments.cold:
            forget(arguments.checkpoint)
        rate = read_rate(arguments.checkpoint)
        if arguments.cold:
            forget(arguments.checkpoint)
        run = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        runs.append({**run, "read_gb_s": rate, "share_of_read": run["gb_s"] / rate})
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    document = {"cold": arguments.cold, "quantization": arguments.quantization, "median": medians, "runs": runs}
    print(json.dumps(medians, indent=1))
    if arguments.output:
        write(arguments.output, document)


if __name__ == "__main__":
    main()
