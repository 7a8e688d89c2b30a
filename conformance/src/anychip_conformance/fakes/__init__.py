"""Simulated platforms in host memory. Each imposes the limits of a kind of device that core's authors do not have.

This module announces them and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import API_VERSION, DeviceInfo, ModelManifest, PlatformManifest, ProbeResult, hookimpl
from anychip_conformance.toys import MODEL as TOY

NUM_SPMD_DEVICES = 4


def probe_one() -> ProbeResult:
    return ProbeResult(devices=(DeviceInfo(index=0, name="simulated", backing="simulated"),))


def probe_two() -> ProbeResult:
    return ProbeResult(devices=probe_four().devices[:2])


def probe_four() -> ProbeResult:
    return ProbeResult(
        devices=tuple(DeviceInfo(index=i, name="simulated", backing="simulated") for i in range(NUM_SPMD_DEVICES))
    )


STATIC = PlatformManifest(
    name="fake-static",
    package="anychip-conformance",
    api_version=API_VERSION,
    summary="simulation: compiled steps of a few shapes, donated state",
    probe="anychip_conformance.fakes:probe_one",
    platform="anychip_conformance.fakes.static:StaticPlatform",
    seam="step",
    auto_select=False,
)
HOSTLEN = PlatformManifest(
    name="fake-hostlen",
    package="anychip-conformance",
    api_version=API_VERSION,
    summary="simulation: exact host lengths, int32 slots, recorded graphs with collectives in them",
    probe="anychip_conformance.fakes:probe_two",
    platform="anychip_conformance.fakes.hostlen:HostlenPlatform",
    auto_select=False,
)
SPMD = PlatformManifest(
    name="fake-spmd",
    package="anychip-conformance",
    api_version=API_VERSION,
    summary="simulation: four devices driven by one process",
    probe="anychip_conformance.fakes:probe_four",
    platform="anychip_conformance.fakes.spmd:SpmdPlatform",
    seam="step",
    topology="process_per_host",
    auto_select=False,
)
MESH = PlatformManifest(
    name="fake-mesh",
    package="anychip-conformance",
    api_version=API_VERSION,
    summary="simulation: four devices driven by one process, experts over two and tensors over two",
    probe="anychip_conformance.fakes:probe_four",
    platform="anychip_conformance.fakes.mesh:MeshPlatform",
    seam="step",
    topology="process_per_host",
    auto_select=False,
)


@hookimpl
def anychip_platforms() -> Sequence[PlatformManifest]:
    return [STATIC, HOSTLEN, SPMD, MESH]


@hookimpl
def anychip_models() -> Sequence[ModelManifest]:
    return [TOY]
