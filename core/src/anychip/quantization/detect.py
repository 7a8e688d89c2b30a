"""Finds how a checkpoint's matrices are stored, from config.json and what the user asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from anychip.errors import CheckpointError, ConfigError
from anychip.plugin_api import Platform, QuantScheme, Unsupported
from anychip.plugin_api.refusals import among
from anychip.quantization.format import AT_LOAD, GROUP_SIZES, PlainFormat, QuantizeAtLoad, WeightFormat
from anychip.registry.blame import calling, imported, package_of
from anychip.registry.quant_methods import METHODS, REFUSED


def weight_format(
    raw: Mapping[str, Any],
    asked: str | None,
    names: Callable[[], frozenset[str]],
    contributed: Mapping[str, str] | None = None,
) -> WeightFormat:
    """`raw` is config.json, `names` are the checkpoint's tensors, `contributed` maps methods to the dotted classes that
    packages bring. Raises ConfigError for a method that is not known, and where what was asked for is not what the
    checkpoint holds."""
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if settings is None:
        if asked is None:
            return PlainFormat()
        if asked in AT_LOAD:
            return QuantizeAtLoad(asked)
        raise ConfigError(
            f"quantization {asked!r}: the checkpoint is not quantized; at load it can be quantized to "
            f"{', '.join(AT_LOAD)}"
        )
    method = settings.get("quant_method")
    known = {**METHODS, **(contributed or {})}
    if method not in known:
        why = f" ({REFUSED[method]})" if method in REFUSED else ""
        raise ConfigError(f"quantization method {method!r} is not supported{why}; supported are {', '.join(known)}")
    if asked not in (None, method):
        raise ConfigError(f"quantization {asked!r} was asked for, and the checkpoint is {method}; leave it out")
    make, held = imported(known[method]), names()
    with calling(package_of(known[method]), known[method]):
        try:
            made: WeightFormat = make(settings, held)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config of method {method} cannot be read: {error!r}") from error
    return made


class CheckedFormat:
    """A format whose schemes the platform has declared."""

    def __init__(self, inner: WeightFormat, platform: Platform) -> None:
        self._inner = inner
        self._platform = platform
        self.want = inner.want
        self.want_stack = inner.want_stack
        self.ordered = inner.ordered

    def for_router(self) -> WeightFormat:
        return CheckedFormat(self._inner.for_router(), self._platform)

    def for_head(self) -> WeightFormat:
        """Plain where the device lacks the head's scheme: it may take what the other matrices are in."""
        inner = self._inner.for_head()
        scheme = inner.scheme("head", GROUP_SIZES[0])
        lacks = scheme is not None and scheme.name not in self._platform.capabilities.quantization
        return PlainFormat() if lacks else CheckedFormat(inner, self._platform)

    def scheme(self, module: str, in_features: int) -> QuantScheme | None:
        """Raises Unsupported, naming what the platform takes."""
        scheme = self._inner.scheme(module, in_features)
        able = self._platform.capabilities.quantization
        if scheme is not None and scheme.name not in able:
            raise Unsupported(
                f"{self._platform.name} with a checkpoint in {scheme.name} ({module})",
                [f"the device does not take it: {among(scheme.name, able)}"],
            )
        return scheme
