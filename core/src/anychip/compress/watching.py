"""Sees what the linear layers of a decoder layer are fed, and which norms feed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from anychip.compress.gptq import Moments


@dataclass(slots=True)
class Watched:
    """`moments` are by linear layer; those that are fed the same tensor share theirs. `feeds` are the linear layers
    that are fed a norm's own output, by the norm's name within the decoder layer."""

    moments: dict[str, Moments] = field(default_factory=dict)
    feeds: dict[str, list[str]] = field(default_factory=dict)


@contextmanager
def watched(layer: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[Watched]:
    """Fills what it yields while the layer is run, once for each text."""
    seen, watch = Watched(), _Watch()
    handles: list[Any] = [
        module.register_forward_hook(watch.norm(seen, name))
        for name, module in layer.named_modules()
        if isinstance(weight := module._parameters.get("weight"), Tensor) and weight.dim() == 1
    ]
    handles += [linear.register_forward_pre_hook(watch.linear(seen, name)) for name, linear in linears.items()]
    handles.append(layer.register_forward_hook(lambda *_: watch.forget()))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Knows tensors by identity, and holds them while a text runs, so that no other takes the identity of one that is
    gone."""

    def __init__(self) -> None:
        self._sums: dict[str, Moments] = {}  # by the linear layer that is first to see an input
        self._inputs: list[tuple[Tensor, str]] = []
        self._outputs: list[tuple[Tensor, str]] = []

    def forget(self) -> None:
        self._inputs.clear()
        self._outputs.clear()

    def norm(self, seen: Watched, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._outputs.append((output, name))

        return look

    def linear(self, seen: Watched, name: str) -> Any:
        def look(module: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            given = inputs[0]
            if name not in seen.moments:
                first = next((who for tensor, who in self._inputs if tensor is given), name)
                if first == name:
                    self._sums[name] = Moments(module.in_features, given.device)
                seen.moments[name] = self._sums[first]
                source = next((who for tensor, who in self._outputs if tensor is given), None)
                if source is not None:
                    seen.feeds.setdefault(source, []).append(name)
            if name in self._sums:
                self._inputs.append((given, name))
                self._sums[name].add(given)

        return look
