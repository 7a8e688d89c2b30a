"""HQQ's container, as safetensors: values with float zeros, groups along rows (axis 1).

Tensors of a module: W_q uint8, the matrix as [groups of all rows, group_size] in 8 / nbits pieces of its rows, the
first piece in the highest bits; scale and zero [groups of all rows, 1]; and settings, a number each: nbits, group_size,
axis, shape and others. Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anychip.errors import CheckpointError, ConfigError, Unsupported
from anychip.plugin_api import QuantScheme
from anychip.quantization.format import Container
from anychip.quantization.gptq import signed
from anychip.quantization.stored import put_grouped, want_nothing, want_together
from anychip.weights.matrix import Matrix
from anychip.weights.register import WeightRegister

_BITS = (8, 4, 2)
_CHECKED = ("nbits", "group_size", "axis")
_UNUSED = (
    "shape", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype",
    "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
"""Settings that follow from those of config.json or change no weight."""


class HQQ(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        self._settings: Mapping[str, Any] = config["quant_config"]
        super().__init__(names)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        if f"{module}.W_q" not in self.names:
            return None
        settings = self._of(module)
        bits, axis = int(settings["nbits"]), int(settings.get("axis", 0))
        size = int(settings["group_size"] or in_features)
        problems = [] if bits in _BITS else [f"{bits} bits; {', '.join(map(str, _BITS))} are read"]
        if axis != 1:
            problems.append("groups along the matrix's rows are read (axis 1), not across them")
        if settings.get("view_as_float"):
            problems.append("values stored as floats (view_as_float); save the model without it")
        if problems:
            raise Unsupported(f"HQQ checkpoint, {module}", problems)
        if in_features % size:
            raise ConfigError(f"{module} has {in_features} input features, which groups of {size} do not divide")
        # Two bits take the space of four: no device here holds them with float zeros.
        return QuantScheme(values="int8" if bits == 8 else "int4", scales="group", group_size=size, zero_points="float")

    def _of(self, module: str) -> Mapping[str, Any]:
        """The settings of all modules, or those of modules whose names end so."""
        if "weight_quant_params" in self._settings:
            found: Mapping[str, Any] = self._settings["weight_quant_params"]
            return found
        for ending, settings in self._settings.items():
            if module.endswith(f".{ending}"):
                return settings["weight_quant_params"]  # type: ignore[no-any-return]
        raise ConfigError(f"quantization_config names no settings for {module}, which is stored quantized")

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        name, size = matrix.name, scheme.group_size
        rows, columns = matrix.shape
        assert size is not None
        settings = self._of(name)
        bits, groups = int(settings["nbits"]), columns // size
        given = tuple(each for each in _CHECKED if f"{name}.{each}" in self.names)

        def take(held: dict[str, Tensor]) -> None:
            for each in given:
                stored = int(held[f"{name}.{each}"].flatten()[0])
                if settings.get(each) is not None and stored != int(settings[each]):
                    raise CheckpointError(f"{name}.{each} is {stored}, quantization_config says {settings[each]}")
            values = _unpack(held[f"{name}.W_q"], bits).reshape(rows, columns)
            zeros = held[f"{name}.zero"].float().view(rows, groups)
            if bits == 8:
                values, zeros = signed(values), zeros - 128
            put_grouped(matrix, scheme, values, held[f"{name}.scale"].float().view(rows, groups), zeros)

        shapes: dict[str, tuple[int, ...] | None] = {f"{name}.{each}": None for each in given}
        shapes |= {f"{name}.W_q": (rows * groups * bits // 8, size)}
        shapes |= {f"{name}.scale": (rows * groups, 1), f"{name}.zero": (rows * groups, 1)}
        want_together(register, shapes, take)
        want_nothing(register, *(f"{name}.{each}" for each in _UNUSED))


def _unpack(held: Tensor, bits: int) -> Tensor:
    """uint8 values of bytes that each hold one of every piece of rows, the first piece highest."""
    shifts = range(8 - bits, -1, -bits)
    return torch.cat([(held >> shift) & ((1 << bits) - 1) for shift in shifts])
