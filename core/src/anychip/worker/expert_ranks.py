"""Over which ranks of a mesh the experts lie, and whether they can."""

from __future__ import annotations

from dataclasses import replace

from anychip.config import EngineConfig
from anychip.errors import ConfigError, Unsupported
from anychip.plugin_api import MeshShape, Platform, StepModel


def with_experts(shape: MeshShape, config: EngineConfig, platform: Platform) -> MeshShape:
    """The mesh of a configuration with expert_parallel: its axis ep covers tp, and dp where there are lanes, but for a
    mesh of devices that has an axis ep already. Raises ConfigError for one rank and for redundant experts that do not
    divide, and Unsupported for devices of one process whose step program has no experts on devices of their own, or
    cannot move them, and for step programs that would have to serve other lanes."""
    of_devices = platform.device_mesh.size > 1
    if of_devices and config.eplb_interval is not None:
        raise Unsupported(platform.name, ["eplb_interval: its step program cannot move experts between devices"])
    if shape.size_of("ep") == 1:
        if of_devices:
            raise Unsupported(platform.name, [f"expert_parallel: its devices form a mesh of {shape}, without ep"])
        if shape.dp > 1 and platform.context.manifest.seam == "step":
            raise Unsupported(platform.name, ["expert_parallel over lanes: its step program runs whole steps alone"])
        shape = replace(shape, joined={**shape.joined, "ep": ("dp", "tp") if shape.dp > 1 else ("tp",)})
    ranks, spare = shape.size_of("ep"), config.num_redundant_experts
    if ranks == 1:
        raise ConfigError(
            "expert_parallel spreads experts over ranks, and there is 1; give a tensor_parallel_size or "
            "a data_parallel_size"
        )
    if spare % ranks:
        raise ConfigError(
            f"{spare} redundant experts do not split evenly over {ranks} ranks; give {spare // ranks * ranks} or "
            f"{(spare // ranks + 1) * ranks} with --num-redundant-experts"
        )
    return shape


def described_over_lanes(shape: MeshShape, token_bytes: int) -> str:
    """For people: where experts lie that all lanes share, and what the links carry for a token of so many bytes."""
    return (
        f"experts lie over {shape.size_of('ep')} ranks of {shape.dp} lanes; in each of their layers a token sends "
        f"{token_bytes} B to the rank of each expert that it picks, and gets as much back"
    )


def check_spread(model: StepModel, architecture: str, config: EngineConfig) -> None:
    """Raises ConfigError for a model without experts, where they are to lie on several ranks."""
    if config.expert_parallel and not getattr(model, "expert_layers", ()):
        raise ConfigError(
            f"{architecture}: expert_parallel: it has no experts that ranks could share; leave --expert-parallel out"
        )
