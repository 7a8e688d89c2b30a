"""Triton kernels that plugins share, a library; and one platform of its own, which runs them in Triton's interpreter.

This module announces that platform and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import (
    API_VERSION,
    CommandManifest,
    DeviceInfo,
    PlatformManifest,
    ProbeResult,
    Requirement,
    hookimpl,
)

TRITON = Requirement(kind="package", name="triton", range=">=3.5", remedy="pip install 'triton>=3.5'")

INTERPRETER = PlatformManifest(
    name="triton-interpreter",
    package="anychip-triton",
    api_version=API_VERSION,
    summary="simulation: the kernels of cuda and rocm in Triton's interpreter, for tests; very slow",
    probe="anychip_triton:probe_interpreter",
    platform="anychip_triton.interpreter:InterpreterPlatform",
    seam="torch",
    topology="process_per_device",
    requirements=(TRITON,),
    auto_select=False,
)


_REACH = 1025
"""Sizes up to which the interpreter is judged: it computes one program of a grid after the other."""


def probe_interpreter() -> ProbeResult:
    shown = DeviceInfo(index=0, name="Triton's interpreter", backing="simulated", reach=_REACH)
    return ProbeResult(devices=(shown,))


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [INTERPRETER]


@hookimpl
def anychip_commands() -> Sequence[CommandManifest]:
    return [
        CommandManifest(
            name="tune", summary="time a GPU's tile sizes, and keep the fastest", module="anychip_triton.tune"
        )
    ]
