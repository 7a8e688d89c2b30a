"""Honest platforms with one planted fault each: the suite must kill every one, by the case that the fault names.

`fake-faulty --device-opt fault=ID` is such a platform on the torch seam; `fake-faulty-graphs`, `fake-faulty-step` and
`fake-faulty-mesh` take those of graphs, of step programs and of meshes of devices. Without a fault they are honest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anychip.plugin_api import API_VERSION, PlatformManifest, PluginOptions, hookimpl


@dataclass(frozen=True, kw_only=True)
class FaultyOptions(PluginOptions):
    fault: str = field(default="", metadata={"help": "the id of the fault; none: honest"})


def _manifest(
    name: str, platform: str, summary: str, seam: str = "torch", topology: str = "process_per_device"
) -> PlatformManifest:
    return PlatformManifest(
        name=name,
        package="anychip-conformance",
        api_version=API_VERSION,
        summary=summary,
        probe="anychip_conformance.fakes:probe_four",
        platform=f"anychip_conformance.faulty.platform:{platform}",
        options=FaultyOptions,
        seam=seam,  # type: ignore[arg-type]
        topology=topology,  # type: ignore[arg-type]
        auto_select=False,
    )


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [
        _manifest("fake-faulty", "FaultyPlatform", "simulation: reference kernels with one planted fault"),
        _manifest("fake-faulty-graphs", "FaultyGraphsPlatform", "simulation: recorded graphs with one planted fault"),
        _manifest(
            "fake-faulty-step", "FaultyStepPlatform", "simulation: compiled steps with one planted fault", "step"
        ),
        _manifest(
            "fake-faulty-mesh",
            "FaultyMeshPlatform",
            "simulation: a mesh of devices with one planted fault",
            "step",
            "process_per_host",
        ),
    ]
