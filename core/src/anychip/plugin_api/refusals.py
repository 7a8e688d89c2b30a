"""What a device did not declare, of a spec: the reasons for which its factory refuses."""

from __future__ import annotations

from anychip.plugin_api.attention import AttentionSpec
from anychip.plugin_api.capabilities import Capabilities
from anychip.plugin_api.linear import LinearSpec
from anychip.plugin_api.moe import MoESpec


def undeclared(spec: AttentionSpec | LinearSpec | MoESpec, capabilities: Capabilities) -> list[str]:
    """Every reason; empty where the device declares all that the spec asks for."""
    reasons = []
    if spec.dtype not in capabilities.dtypes:
        reasons.append(f"dtype {spec.dtype}; there are {', '.join(sorted(capabilities.dtypes))}")
    if isinstance(spec, AttentionSpec):
        reasons += _attention(spec, capabilities)
    elif spec.scheme is not None and spec.scheme.name not in capabilities.quantization:
        there = ", ".join(sorted(capabilities.quantization)) or "none"
        reasons.append(f"quantization {spec.scheme.name}; there are {there}")
    if spec.invariant and not capabilities.batch_invariant:
        reasons.append("batch invariance")
    return reasons


def _attention(spec: AttentionSpec, capabilities: Capabilities) -> list[str]:
    reasons = []
    if spec.kv_dtype not in capabilities.kv_dtypes:
        reasons.append(f"a cache of {spec.kv_dtype}; there are {', '.join(sorted(capabilities.kv_dtypes))}")
    if capabilities.head_dims is not None and spec.head_dim not in capabilities.head_dims:
        reasons.append(f"head_dim {spec.head_dim}; there are {', '.join(map(str, sorted(capabilities.head_dims)))}")
    for name, wanted, declared in (
        ("sliding windows", spec.window is not None, capabilities.sliding_window),
        ("softcap", spec.softcap is not None, capabilities.softcap),
        ("ALiBi", spec.alibi, capabilities.alibi),
        ("sinks", spec.sinks, capabilities.sinks),
        ("MLA", spec.kind == "mla", capabilities.mla),
    ):
        if wanted and not declared:
            reasons.append(name)
    return reasons
