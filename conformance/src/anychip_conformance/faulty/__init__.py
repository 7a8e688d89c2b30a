"""Honest platforms with one planted fault each: the suite must kill every one, by the case that the fault names.

`fake-faulty --device-opt fault=ID` is such a platform on the torch seam; `fake-faulty-graphs` and `fake-faulty-step`
take the faults of graphs and of step programs. Without a fault they are honest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anychip.plugin_api import API_VERSION, PlatformManifest, PluginOptions, hookimpl


@dataclass(frozen=True, kw_only=True)
class FaultyOptions(PluginOptions):
    fault: str = field(default="", metadata={"help": "the id of the fault; none: honest"})


def _manifest(name: str, platform: str, summary: str, seam: str = "torch") -> PlatformManifest:
    return PlatformManifest(
        name=name,
        package="anychip-conformance",
        api_version=API_VERSION,
        summary=summary,
        probe="anychip_conformance.fakes:probe_four",
        platform=f"anychip_conformance.faulty.platform:{platform}",
        options=FaultyOptions,
        seam=seam,  # type: ignore[arg-type]
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
    ]
