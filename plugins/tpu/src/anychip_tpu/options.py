"""Settings of --device-opt."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from anychip.plugin_api import PluginOptions


@dataclass(frozen=True, kw_only=True)
class TpuOptions(PluginOptions):
    runtime: str = field(
        default="auto",
        metadata={"help": "auto, xla (torch_xla) or torchtpu (torch_tpu); auto takes torch_tpu where it is installed"},
    )
    cache: bool = field(default=True, metadata={"help": "keep compiled programs for later starts"})
    cache_dir: str = field(
        default="", metadata={"help": "where to keep them; empty: anychip/tpu in the user's cache folder"}
    )

    @property
    def cache_folder(self) -> Path | None:
        """None: nothing is kept."""
        if not self.cache:
            return None
        if self.cache_dir:
            return Path(self.cache_dir)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "anychip" / "tpu"
