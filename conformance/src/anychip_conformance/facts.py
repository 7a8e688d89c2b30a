"""What is known of the judged device beside its verdicts: hardware, versions, what it declares, what was relaxed."""

from __future__ import annotations

import os
import platform
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version

import msgspec
import torch

from anychip.plugin_api import Capabilities, GraphLevel
from anychip_conformance.device import Device

FLAGS = ("sliding_window", "softcap", "alibi", "sinks", "attention_lse", "mla", "sparse_latent", "encoders",
         "seeded_sampling", "batch_invariant", "lora", "streams")  # fmt: skip
"""Capabilities that are there or not."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """`declared` and `undeclared` name capabilities as Device.need does."""

    evidence: str
    hardware: list[str]
    versions: dict[str, str]
    machine: str
    declared: list[str]
    undeclared: list[str]
    relaxations: list[str]


def gather_facts(device: Device) -> Facts:
    caps = device.capabilities
    return Facts(
        evidence=device.probe.devices[0].backing,
        hardware=[found.name for found in device.probe.devices[:1]],
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "anychip": _version("anychip"),
            "anychip-conformance": _version("anychip-conformance"),
            device.manifest.package: _version(device.manifest.package),
            **device.probe.versions,
        },
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        declared=declared(caps),
        undeclared=[name for name in FLAGS if not getattr(caps, name)]
        + (["collectives"] if caps.collectives == "none" else [])
        + (["graphs"] if caps.graph_level is GraphLevel.NONE else []),
        relaxations=relaxations(device),
    )


def declared(caps: Capabilities) -> list[str]:
    """Names of everything that a device says it can do."""
    names = [f"dtype {dtype}" for dtype in sorted(caps.dtypes)]
    names += [f"kv dtype {dtype}" for dtype in sorted(caps.kv_dtypes)]
    names += [f"quantization {scheme}" for scheme in sorted(caps.quantization)]
    names += [f"epilogue {activation}" for activation in sorted(caps.epilogues)]
    names += [f"recurrence {name}" for name in sorted(caps.recurrences)]
    names += [flag for flag in FLAGS if getattr(caps, flag)]
    if caps.collectives != "none":
        names.append("collectives")
    if caps.graph_level is not GraphLevel.NONE:
        names.append("graphs")
    return names


def relaxations(device: Device) -> list[str]:
    """Where the suite asks less of this device than of one without limits."""
    caps, rules = device.capabilities, device.platform.step_rules
    found = []
    if caps.stale_kv == "must_be_finite":
        found.append("free blocks and block tails hold large finite values instead of NaN")
    if caps.head_dims is not None:
        found.append(f"head dims {', '.join(map(str, sorted(caps.head_dims)))} only")
    if caps.max_slots is not None:
        found.append(f"far block ids stay under {caps.max_slots} slots")
    if caps.kv_write == "functional":
        found.append("the cache is copied at every write: far block ids are not reached")
    if caps.padding == "dummy_request":
        found.append("padded rows hold a query of their own: their output is not judged")
    if device.probe.devices[0].reach is not None:
        found.append(f"a simulation, judged at sizes up to {device.probe.devices[0].reach:,}")
    if caps.slot_dtype == "int32":
        found.append("slots are 32 bits wide")
    for rule in fields(rules):
        value = getattr(rules, rule.name)
        if value != rule.default:
            found.append(f"step rule {rule.name} = {value}")
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"
