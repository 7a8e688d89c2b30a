"""What a process of ours is told when it starts: an engine, or the worker of one rank."""

from __future__ import annotations

from typing import Any

import msgspec

from anychip.config import EngineConfig


class WorkerLink(msgspec.Struct, frozen=True):
    """Where a worker gets its steps and leaves its results: endpoints of the engine's sockets."""

    decisions: str
    results: str
    key_file: str = ""
    """Has the key that the sockets ask for; "": they ask for none."""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's place: its rank, the devices that its process drives, where ranks meet."""

    config: EngineConfig
    device: str
    device_indexes: tuple[int, ...]
    rank: int
    world_size: int
    store: str
    folder: str
    probe: dict[str, Any]
    """What the plugin's probe found, as plain values: it is asked once, by who chooses the device."""
    link: WorkerLink | None = None
    """Known when the engine's sockets are bound."""

    @property
    def lane(self) -> int:
        """Whose requests it serves. Lanes have no stages."""
        return self.rank // (self.world_size // self.config.data_parallel_size)

    @property
    def reports(self) -> bool:
        """Whether its results are the engine's: those of the first rank that draws, which is of the last stage, and one
        in each lane."""
        each = self.world_size // self.config.data_parallel_size
        return self.rank % each == each - each // self.config.pipeline_parallel_size


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process is told: its configuration, and the folder of its sockets."""

    config: EngineConfig
    folder: str
