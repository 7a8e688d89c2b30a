"""What the worker of one rank is told, wherever it runs."""

from __future__ import annotations

from pathlib import Path

import msgspec

from anychip.config import EngineConfig
from anychip.process_specs import WorkerSpec
from anychip.registry.devices import ChosenDevice


def worker_spec(config: EngineConfig, chosen: ChosenDevice, folder: Path, rank: int) -> WorkerSpec:
    """What the worker of one rank is told."""
    return WorkerSpec(
        config=config,
        device=chosen.manifest.name,
        device_indexes=chosen.indexes if chosen.per_host else (chosen.indexes[rank],),
        rank=rank,
        world_size=1 if chosen.per_host else len(chosen.indexes),
        store=f"file://{folder}/store",
        folder=str(folder),
        probe=msgspec.to_builtins(chosen.candidate.probe),
    )
