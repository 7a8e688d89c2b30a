"""Writes a checkpoint's tensors into safetensors files of bounded size, with an index where there are several."""

from __future__ import annotations

from pathlib import Path

import msgspec
from safetensors.torch import save_file
from torch import Tensor

from anychip.weight_files import INDEX, WHOLE

SHARD_BYTES = 4 << 30


class ShardWriter:
    """Holds no more than a shard's tensors."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._written: list[list[str]] = []  # names by shard
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._held[name] = tensor.contiguous().cpu()
        self._held_bytes += tensor.nbytes

    def close(self) -> None:
        """Only now is it known how many files there are, which their names tell."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self._folder / WHOLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written):
            name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(index)))

    def _flush(self) -> None:
        save_file(self._held, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._held))
        self.num_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}.safetensors"
