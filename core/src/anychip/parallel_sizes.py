"""How many ranks share a model, and along which axes, as the configuration says it. Opens no groups: the mesh does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anychip.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """Ranks along each axis of the mesh, by the axes' names in plugin_api.mesh. Fields are in the mesh's order."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
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
        named = {
            "pipeline_parallel_size": self.pp,
            "data_parallel_size": self.dp,
            "context_parallel_size": self.cp,
            "tensor_parallel_size": self.tp,
        }
        return {name: size for name, size in named.items() if size > 1} or {"tensor_parallel_size": self.tp}

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp * self.cp * self.tp


def check_lanes(sizes: ParallelSizes, asked: Mapping[str, bool]) -> None:
    """Raises ConfigError for data-parallel lanes that no engine can have. `asked` says by setting whether something is
    asked for that lanes do not do."""
    several = {"pipeline_parallel_size": sizes.pp > 1, "context_parallel_size": sizes.cp > 1}
    refused = [name for name, wanted in {**several, **asked}.items() if wanted]
    if sizes.dp > 1 and refused:
        raise ConfigError(
            f"{' and '.join(refused)} with data_parallel_size {sizes.dp}: the lanes of one engine do not have that; "
            "leave one of them out, or run replicas, each an engine of its own"
        )


def check_stages(sizes: ParallelSizes, layers: Sequence[int], asked: Mapping[str, bool]) -> None:
    """Raises ConfigError for stages that no engine can have, whatever its model. `layers` are those of each stage, ()
    where nobody says; `asked` says by setting whether something is asked for that does not go over stages."""
    shown = ",".join(map(str, layers))
    if layers and len(layers) != sizes.pp:
        raise ConfigError(
            f"pipeline_layers {shown} are {len(layers)} stages, and pipeline_parallel_size is {sizes.pp}; give one "
            "number of layers a stage"
        )
    if layers and min(layers) < 1:
        raise ConfigError(f"pipeline_layers {shown} has a stage without layers; give each 1 or more")
    refused = [name for name, wanted in asked.items() if wanted]
    if sizes.pp > 1 and refused:
        raise ConfigError(
            f"{' and '.join(refused)} with pipeline_parallel_size {sizes.pp}: hidden states and drafts stay within one "
            "stage; leave one of them out"
        )


def check_contexts(sizes: ParallelSizes, drafts: str | None) -> None:
    """Raises ConfigError for contexts that no engine can have, whatever its model. `drafts`: what drafts in the workers
    beside the model; None: nothing does."""
    if sizes.cp > 1 and drafts is not None:
        raise ConfigError(
            f"speculate {drafts} with context_parallel_size {sizes.cp}: what drafts on the device keeps whole "
            "contexts; leave one of them out, or draft with ngram or suffix"
        )


def check_nodes(sizes: ParallelSizes, nodes: Sequence[str]) -> None:
    """Raises ConfigError for hosts that cannot share the ranks."""
    if len(set(nodes)) < len(nodes) or not all(nodes):
        raise ConfigError(f"nodes are {', '.join(map(repr, nodes))}; expected names that differ")
    if sizes.num_ranks % len(nodes):
        whole = sizes.num_ranks // len(nodes) * len(nodes)
        fits = [size for size in (whole, whole + len(nodes)) if size]
        raise ConfigError(
            f"{sizes} makes {sizes.num_ranks} ranks, which {len(nodes)} nodes cannot share evenly; give "
            f"{' or '.join(map(str, fits))}"
        )
