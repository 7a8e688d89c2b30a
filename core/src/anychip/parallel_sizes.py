"""How many ranks share a model, and along which axes, as the configuration says it. Opens no groups: the mesh does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from anychip.errors import ConfigError

if TYPE_CHECKING:
    from anychip.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """Ranks along each axis of the mesh, by the axes' names in plugin_api.mesh. Fields are in the mesh's order."""

    pp: int = 1
    tp: int = 1

    def __str__(self) -> str:
        """The settings that are not 1, for messages."""
        return " x ".join(f"{name} {size}" for name, size in self._several.items())

    @property
    def settings(self) -> str:
        """Their names alone."""
        return " and ".join(self._several)

    @property
    def _several(self) -> dict[str, int]:
        named = {"pipeline_parallel_size": self.pp, "tensor_parallel_size": self.tp}
        return {name: size for name, size in named.items() if size > 1} or {"tensor_parallel_size": self.tp}

    @property
    def num_ranks(self) -> int:
        return self.pp * self.tp


def check_sizes(config: EngineConfig) -> None:
    """Raises ConfigError for sizes that no engine can have, whatever its model."""
    sizes, layers = config.parallel_sizes, config.pipeline_layers
    if config.executor == "inline" and sizes.num_ranks > 1:
        raise ConfigError(
            f"executor inline drives one worker, and there are ranks by {sizes}; use executor multiprocess"
        )
    shown = ",".join(map(str, layers))
    if layers and len(layers) != sizes.pp:
        raise ConfigError(
            f"pipeline_layers {shown} are {len(layers)} stages, and pipeline_parallel_size is "
            f"{sizes.pp}; give one number of layers a stage"
        )
    if layers and min(layers) < 1:
        raise ConfigError(
            f"pipeline_layers {','.join(map(str, layers))} has a stage without layers; give each 1 or more"
        )
    _check_stages(config)


def _check_stages(config: EngineConfig) -> None:
    """Raises ConfigError for what does not go over stages."""
    if config.parallel_sizes.pp == 1:
        return
    asked = {"speculate": config.speculate is not None, "taps": bool(config.taps)}
    if refused := [name for name, wanted in asked.items() if wanted]:
        raise ConfigError(
            f"{' and '.join(refused)} with pipeline_parallel_size {config.parallel_sizes.pp}: hidden states and drafts "
            "stay within one stage; leave one of them out"
        )


def for_one_host(config: EngineConfig, num_ranks: int = 1) -> EngineConfig:
    """The configuration as one host sees it that chooses devices for so many of the ranks."""
    return msgspec.structs.replace(
        config, nodes=(), tensor_parallel_size=num_ranks, pipeline_parallel_size=1, pipeline_layers=()
    )


def check_nodes(config: EngineConfig) -> None:
    """Raises ConfigError for hosts that cannot share the ranks."""
    if not config.nodes:
        return
    if config.executor in ("inline", "ray"):
        raise ConfigError(f"executor {config.executor} has no use for nodes; leave one of them out")
    if config.cluster_key is None:
        raise ConfigError("nodes takes a cluster_key: whoever reaches the port could join; `openssl rand -hex 32`")
    if len(set(config.nodes)) < len(config.nodes) or not all(config.nodes):
        raise ConfigError(f"nodes are {', '.join(map(repr, config.nodes))}; expected names that differ")
    num_ranks, num_nodes = config.parallel_sizes.num_ranks, len(config.nodes)
    if num_ranks % num_nodes:
        whole = num_ranks // num_nodes * num_nodes
        fits = [size for size in (whole, whole + num_nodes) if size]
        raise ConfigError(
            f"{config.parallel_sizes} makes {num_ranks} ranks, which {num_nodes} nodes cannot share evenly; "
            f"give {' or '.join(map(str, fits))}"
        )
