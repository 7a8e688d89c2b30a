"""Rotary tables from a checkpoint's settings.

Sources: Su et al., "RoFormer", 2021 (the embedding); Meta's Llama 3.1 model card and transformers' documentation of
`rope_type: llama3` (the frequency-dependent scaling) and of Qwen2-VL and Qwen3-VL (`mrope_section`: positions of three
axes); Peng et al., "YaRN", 2023; Ding et al., "LongRoPE", 2024.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anychip.errors import CheckpointError, Unsupported
from anychip.model_config import ModelConfig
from anychip.plugin_api import NUM_AXES, Rope

Parameters = dict[str, Any]


def make_rope(
    config: ModelConfig,
    parameters: Parameters,
    device: str,
    *,
    partial: bool = False,
    head_dim: int | None = None,
    interleaved: bool = False,
) -> Rope:
    """cos and sin for every position, float32. `partial`: the family rotates a share of each head if config.json says
    so; the others rotate whole heads and do not read the field. `head_dim` None: the attention's own; `interleaved` as
    Rope has it. Raises Unsupported for a scaling that is not known."""
    rotary_dim = int((head_dim or config.head_dim) * _rotated_share(config, parameters, partial))
    theta = float(parameters.get("rope_theta") or config.rope_theta)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    try:
        frequencies, amplitude = _scaled(theta**exponents, theta, rotary_dim, parameters, config)
    except KeyError as missing:
        raise CheckpointError(f"the rotary settings of {config.folder}/config.json have no {missing}") from missing
    angles = torch.outer(torch.arange(config.max_positions).float(), frequencies)
    axes = _axes(config, parameters, rotary_dim // 2)
    return Rope(
        cos=(angles.cos() * amplitude).to(device),
        sin=(angles.sin() * amplitude).to(device),
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        axes=None if axes is None else axes.to(device),
    )


def still_rope(config: ModelConfig, device: str, rotary_dim: int) -> Rope:
    """A rotary embedding that turns nothing, for families whose keys have a part that could be turned and is not."""
    shape = (config.max_positions, rotary_dim // 2)
    return Rope(cos=torch.ones(shape).to(device), sin=torch.zeros(shape).to(device), rotary_dim=rotary_dim)


def _axes(config: ModelConfig, parameters: Parameters, count: int) -> Tensor | None:
    """The axis by which each of `count` frequencies turns, where config.json has `mrope_section`: those of an axis
    stand together, or, interleaved, take turns as far as its section reaches. None: positions have one axis."""
    sections = parameters.get("mrope_section")
    if sections is None:
        return None
    if len(sections) != NUM_AXES or sum(sections) != count:
        raise CheckpointError(
            f"mrope_section of {config.folder}/config.json is {sections}; expected {NUM_AXES} sections of {count} "
            "frequencies together"
        )
    if not parameters.get("mrope_interleaved", False):
        return torch.tensor([axis for axis, count in enumerate(sections) for _ in range(count)])
    axes = torch.zeros(count, dtype=torch.int64)
    for axis in range(1, NUM_AXES):
        axes[axis : NUM_AXES * sections[axis] : NUM_AXES] = axis
    return axes


def _rotated_share(config: ModelConfig, parameters: Parameters, partial: bool) -> float:
    share = float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    kind = _kind(parameters)
    if partial or share == 1.0:
        return share
    if kind == "default":  # transformers' classes of these families do not read the field then
        return 1.0
    reason = f"partial_rotary_factor {share} with rope_type {kind!r}: {config.architecture} rotates whole heads"
    raise Unsupported("rotary embedding", [reason])


def _kind(parameters: Parameters) -> str:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return "default" if kind == "mrope" else kind  # what its positions are, not how its frequencies are scaled


def _scaled(
    wavelengths: Tensor, theta: float, rotary_dim: int, parameters: Parameters, config: ModelConfig
) -> tuple[Tensor, float]:
    """Frequencies, of which `wavelengths` are the inverse, and what multiplies cos and sin."""
    kind = _kind(parameters)
    frequencies = 1.0 / wavelengths
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / float(parameters["factor"]), 1.0
    if kind == "llama3":
        return _llama3(frequencies, parameters, config), 1.0
    if kind == "yarn":
        return _yarn(frequencies, theta, rotary_dim, parameters, config)
    if kind in ("longrope", "su"):
        return _longrope(wavelengths, parameters, config)
    if kind == "dynamic":
        return _dynamic(theta, rotary_dim, parameters, config), 1.0
    known = "default, linear, llama3, yarn, longrope and dynamic"
    raise Unsupported("rotary embedding", [f"rope_type {kind!r}; known are {known}"])


def _dynamic(theta: float, rotary_dim: int, parameters: Parameters, config: ModelConfig) -> Tensor:
    """Frequencies for the length that is served, for every request, where it goes beyond the trained one: the library
    takes those of a batch's longest request, which a cache cannot follow."""
    trained, factor = int(config.need("max_position_embeddings")), float(parameters["factor"])
    stretch = factor * max(config.max_positions, trained) / trained - (factor - 1)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    base: float = theta * stretch ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / torch.pow(base, exponents)


def _llama3(frequencies: Tensor, parameters: Parameters, config: ModelConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    original = float(_original(parameters, config))
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, between)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def _yarn(
    frequencies: Tensor, theta: float, rotary_dim: int, parameters: Parameters, config: ModelConfig
) -> tuple[Tensor, float]:
    """Dimensions that turn often within the original length are kept, those that turn rarely are stretched."""
    factor = float(parameters["factor"])
    original = _original(parameters, config)

    def dimension(turns: float) -> float:
        """The dimension that turns this often within the original length."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(float(parameters.get("beta_fast") or 32))
    high = dimension(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = ((torch.arange(rotary_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    stretched = frequencies / factor * ramp + frequencies * (1 - ramp)
    return stretched, _yarn_amplitude(factor, parameters)


def _yarn_amplitude(factor: float, parameters: Parameters) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if above and below:
        return yarn_mscale(factor, float(above)) / yarn_mscale(factor, float(below))
    return yarn_mscale(factor, 1.0)


def yarn_mscale(factor: float, weight: float) -> float:
    """What longer contexts multiply attention's temperature by (Peng et al., section 3.4), weighted."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def yarn_scale(parameters: Parameters) -> float:
    """What families with latent attention multiply the scale of q.k by: where `mscale_all_dim` is given, the
    temperature of the whole product stands here and not in cos and sin."""
    weight = float(parameters.get("mscale_all_dim") or 0.0)
    if _kind(parameters) == "default" or not weight:
        return 1.0
    return yarn_mscale(float(parameters["factor"]), weight) ** 2


def _longrope(wavelengths: Tensor, parameters: Parameters, config: ModelConfig) -> tuple[Tensor, float]:
    """A factor for each dimension: the long ones where the model is served beyond its original length, for every
    request, since a request's cache cannot change its rotation as it grows."""
    original = _original(parameters, config)
    longer = config.max_positions > original
    factors = torch.tensor(parameters["long_factor" if longer else "short_factor"], dtype=torch.float32)
    stretch = float(parameters.get("factor") or int(config.need("max_position_embeddings")) / original)
    given = parameters.get("attention_factor")
    if given is not None:
        amplitude = float(given)
    else:
        amplitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return 1.0 / (factors * wavelengths), amplitude


def _original(parameters: Parameters, config: ModelConfig) -> int:
    """Positions that the model was trained on before its context was stretched. config.json's own field comes before
    that of its rotary settings."""
    return int(
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or config.need("max_position_embeddings")
    )
