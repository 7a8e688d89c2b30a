"""Finds what a spec asks for and a device did not declare: the reasons for a refusal, each with the nearest choice."""

from __future__ import annotations

from collections.abc import Collection

from anychip.plugin_api.attention import AttentionSpec
from anychip.plugin_api.cache_specs import CacheSpec
from anychip.plugin_api.capabilities import Capabilities
from anychip.plugin_api.encoder import EncoderSpec
from anychip.plugin_api.latent import LatentSpec
from anychip.plugin_api.linear import LinearSpec
from anychip.plugin_api.moe import MoESpec
from anychip.plugin_api.quantization import NAMED
from anychip.plugin_api.state import StateSpec
from anychip.types import itemsize

_BITS = {
    "float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8,
    **{name: scheme.bits for name, scheme in NAMED.items()},
}  # fmt: skip
_LISTED = 12


def undeclared(spec: CacheSpec | LinearSpec | MoESpec, capabilities: Capabilities) -> list[str]:
    """Every reason; empty where the device declares all that the spec asks for."""
    reasons = []
    if spec.dtype not in capabilities.dtypes:
        reasons.append(f"dtype {spec.dtype}; {among(spec.dtype, capabilities.dtypes)}")
    if isinstance(spec, AttentionSpec):
        reasons += _attention(spec, capabilities)
    elif isinstance(spec, LatentSpec):
        reasons += _latent(spec, capabilities)
    elif isinstance(spec, StateSpec):
        if spec.recurrence not in capabilities.recurrences:
            reasons.append(f"state layers of the recurrence {spec.recurrence}")
    elif isinstance(spec, EncoderSpec):
        reasons += [] if capabilities.encoders else ["encoder attention"]
    elif spec.scheme is not None and spec.scheme.name not in capabilities.quantization:
        reasons.append(f"quantization {spec.scheme.name}; {among(spec.scheme.name, capabilities.quantization)}")
    if isinstance(spec, MoESpec) and not spec.gated and not capabilities.ungated_experts:
        reasons.append("experts without a gate")
    if isinstance(spec, LinearSpec) and spec.epilogue is not None:
        if spec.epilogue not in capabilities.epilogues:
            reasons.append(f"epilogue {spec.epilogue}")  # no activation stands in for another: none is nearest
        if spec.scheme is not None:
            reasons.append(f"an epilogue of a quantized product: {spec.epilogue} of {spec.scheme.name}")
    if spec.invariant and not capabilities.batch_invariant:
        reasons.append("batch invariance")
    return reasons


def among(wanted: str | int, there: Collection[str] | Collection[int]) -> str:
    """Names the choice of `there` that is nearest to `wanted`: the nearest number, or for dtypes and schemes the one
    with as many bits, or more. Lists the choices too."""
    if not there:
        return "there is none"

    def distance(other: str | int) -> tuple[bool, int, str]:
        have, want = (_BITS.get(x, 0) if isinstance(x, str) else x for x in (other, wanted))
        return isinstance(other, str) and have < want, abs(have - want), str(other)

    ordered: list[str | int] = sorted(there)
    listed = ", ".join(map(str, ordered)) if len(ordered) <= _LISTED else f"{ordered[0]} to {ordered[-1]}"
    return f"{min(ordered, key=distance)} is nearest; available: {listed}"


def _latent(spec: LatentSpec, capabilities: Capabilities) -> list[str]:
    reasons = [] if capabilities.mla else ["latent attention (MLA)"]
    if spec.kv_dtype not in capabilities.kv_dtypes:
        reasons.append(f"a cache of {spec.kv_dtype}; {among(spec.kv_dtype, capabilities.kv_dtypes)}")
    if itemsize(spec.kv_dtype) == 1:
        if spec.kv_dtype not in capabilities.latent_kv_dtypes:
            able = {spec.dtype, *capabilities.latent_kv_dtypes}
            reasons.append(f"latent rows in {spec.kv_dtype}; {among(spec.kv_dtype, able)}")
        elif spec.index_dim:
            reasons.append(f"index keys in {spec.kv_dtype}; {spec.dtype} is available")
    if spec.window is not None and not capabilities.sliding_window:
        reasons.append("sliding windows")
    if spec.index_dim and not capabilities.sparse_latent:
        reasons.append("queries that choose the tokens they attend to (sparse attention)")
    return reasons


def _attention(spec: AttentionSpec, capabilities: Capabilities) -> list[str]:
    reasons = []
    if spec.kv_dtype not in capabilities.kv_dtypes:
        reasons.append(f"a cache of {spec.kv_dtype}; {among(spec.kv_dtype, capabilities.kv_dtypes)}")
    if capabilities.head_dims is not None and spec.head_dim not in capabilities.head_dims:
        reasons.append(f"head_dim {spec.head_dim}; {among(spec.head_dim, capabilities.head_dims)}")
    for name, wanted, declared in (
        ("sliding windows", spec.window is not None, capabilities.sliding_window),
        ("softcap", spec.softcap is not None, capabilities.softcap),
        ("ALiBi", spec.alibi, capabilities.alibi),
        ("sinks", spec.sinks, capabilities.sinks),
        ("the log-sum-exp of attention", spec.lse, capabilities.attention_lse),
    ):
        if wanted and not declared:
            reasons.append(name)
    return reasons
