"""torch.compile as a RegionCompiler: an option beside the fused kernels that are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from anychip.plugin_api import RegionCompiler


class TorchCompiler(RegionCompiler):
    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend

    def compile(self, fn: Callable[..., Any], *, name: str) -> Callable[..., Any]:
        """One form for any number of rows; a region that breaks apart is an error."""
        compiled: Callable[..., Any] = torch.compile(fn, backend=self._backend, dynamic=True, fullgraph=True)
        return compiled
