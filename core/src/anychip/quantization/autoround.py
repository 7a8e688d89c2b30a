"""AutoRound's container: GPTQ's or AWQ's, as packing_format says, with settings of single modules.

https://github.com/intel/auto-round
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from anychip.errors import Unsupported
from anychip.plugin_api import QuantScheme
from anychip.quantization.awq import AWQ
from anychip.quantization.format import Container
from anychip.quantization.gptq import GPTQ
from anychip.weights.matrix import Matrix
from anychip.weights.register import WeightRegister

_PACKED: Mapping[str, type[GPTQ] | type[AWQ]] = {"auto_round:auto_gptq": GPTQ, "auto_round:auto_awq": AWQ}
_SETTINGS = ("bits", "group_size", "sym")


class AutoRound(Container):
    def __init__(self, config: Mapping[str, Any], names: frozenset[str]) -> None:
        packing = config.get("packing_format", "auto_round:auto_gptq")
        problems = []
        if packing not in _PACKED:
            problems.append(f"packing_format {packing}; {' and '.join(_PACKED)} are read")
        if config.get("data_type", "int") != "int":
            problems.append(f"data_type {config['data_type']}; int is read")
        if problems:
            raise Unsupported("AutoRound checkpoint", problems)
        self._make = _PACKED[packing]
        self._config = config
        self._made: dict[tuple[Any, ...], Container] = {}
        super().__init__(names)

    def _of(self, module: str) -> Container:
        """The container in a module's settings, whose names may be patterns."""
        extra: Mapping[str, Any] = self._config.get("extra_config") or {}
        own: Mapping[str, Any] = extra.get(module) or next(
            (given for name, given in extra.items() if re.fullmatch(name, module)), {}
        )
        settings = {name: own.get(name, self._config.get(name)) for name in _SETTINGS}
        key = tuple(settings.values())
        if key not in self._made:
            zeros = {"zero_point": not settings["sym"], "desc_act": False}
            self._made[key] = self._make({**settings, **zeros}, self.names)
        return self._made[key]

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        return self._of(module).scheme(module, in_features) if f"{module}.qweight" in self.names else None

    def want_quantized(self, register: WeightRegister, matrix: Matrix, scheme: QuantScheme) -> None:
        self._of(matrix.name).want_quantized(register, matrix, scheme)
