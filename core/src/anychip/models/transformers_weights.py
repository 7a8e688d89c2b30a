"""Checkpoints whose tensors are not those of the library's modules: renamed, merged, split or turned, as its own
conversions say."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from anychip.errors import CheckpointError
from anychip.plugin_api import WeightView
from anychip.weights.register import WeightRegister, WeightSlot

_GATE_UP, _DOWN = [MergeModulelist, Concatenate], [MergeModulelist]
"""How the library makes its stacks of experts that a checkpoint keeps apart."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Modules of one expert."""

    gate: str
    up: str
    down: str


class Conversions:
    """Of one model. `stored`: the checkpoint's names; none where weights are made up."""

    def __init__(self, model: PreTrainedModel, stored: frozenset[str]) -> None:
        self._model = model
        mapping = get_model_conversion_mapping(model)
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._stored = sorted(self.rename(name) for name in stored)
        self._stacks = [name for name in self._stored if name.endswith(".gate_up_proj")]

    def rename(self, name: str) -> str:
        """The library's modules have changed names since some checkpoints were written."""
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return str(name)

    def experts(self, module: str, count: int) -> list[ExpertNames]:
        """The modules of each expert of the library's `module`, where a checkpoint keeps them apart and the library
        would stack them; [] where it has the stacks."""
        gate_up = self._sources(f"{module}.gate_up_proj", _GATE_UP)
        down = self._sources(f"{module}.down_proj", _DOWN)
        if len(gate_up) != 2 or len(down) != 1:
            return []
        if any(f"{module}.gate_up_proj".endswith(name) for name in self._stacks):  # a decoder alone has no prefix
            return []
        patterns = (*gate_up, *down)
        return [ExpertNames(*(each.replace("*", str(expert)) for each in patterns)) for expert in range(count)]

    def _sources(self, name: str, operations: Sequence[type]) -> list[str]:
        """Modules that the library merges into tensor `name` by these operations, with * for an expert's number."""
        for converter in self._converters:
            target = converter.target_patterns[0]
            if [type(each) for each in converter.operations] == operations and name.endswith(target):
                before = name.removesuffix(target)
                return [before + each.removesuffix(".weight") for each in converter.source_patterns]
        return []

    def redirect(self, register: WeightRegister) -> None:
        """Of wanted tensors that the checkpoint has in another form, wants what they are made of."""
        groups: dict[tuple[int, str], _Group] = {}
        for stored in self._stored:
            for index, converter in enumerate(self._converters):
                source = stored
                target, pattern = converter.rename_source_key(source)
                if pattern is None:
                    continue
                if target not in register.slots and register.decoder + target in register.slots:
                    source, target = register.decoder + source, register.decoder + target
                if source not in register.slots or source == target:
                    group = groups.setdefault((index, target), _Group(converter, target))
                    group.sources[source] = pattern
                break
        for group in groups.values():
            group.redirect(register, self._model)


@dataclass(slots=True)
class _Group:
    """Tensors that are converted together."""

    converter: Any
    target: str
    sources: dict[str, str] = field(default_factory=dict)
    """By name, the pattern that it matched."""

    def redirect(self, register: WeightRegister, model: PreTrainedModel) -> None:
        first, *others = self.converter.target_patterns
        names = [self.target, *(self.target.replace(first, other) for other in others)]
        slots = {name: register.slots.pop(name) for name in names if name in register.slots}
        if not slots:
            return
        read: dict[str, Tensor] = {}

        def take(name: str, view: WeightView) -> None:
            read[name] = view.read(*((0, extent) for extent in view.shape))
            if len(read) == len(self.sources):
                self._convert(read, slots, model, view.source)
                read.clear()

        for name in self.sources:
            register.want(name, None, lambda view, name=name: take(name, view))  # type: ignore[misc]

    def _convert(self, read: dict[str, Tensor], slots: dict[str, WeightSlot], model: Any, source: str) -> None:
        converter = copy.deepcopy(self.converter)
        for name, pattern in sorted(self.sources.items(), key=lambda item: _natural(item[0])):
            converter.add_tensor(self.target, name, pattern, read[name])
        try:
            made = converter.convert(self.target, model=model, config=model.config)
        except Exception as error:
            raise CheckpointError(f"{source} cannot be converted to {self.target}: {error}") from error
        for name, slot in slots.items():
            tensor = made.get(name)
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            shape = None if tensor is None else tuple(tensor.shape)
            if tensor is None or (slot.shape is not None and shape != slot.shape):
                raise CheckpointError(f"{source} converts to {name} of shape {shape}, the model wants {slot.shape}")
            for take in slot.takers:
                take(ConvertedView(f"{name} made of {source}", tensor))


def _natural(name: str) -> list[tuple[int, str]]:
    """Orders layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


class ConvertedView:
    """plugin_api.WeightView over a tensor in memory."""

    def __init__(self, source: str, tensor: Tensor) -> None:
        self.source = source
        self._tensor = tensor
        self.shape = tuple(tensor.shape)
        self.nbytes = tensor.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    def read(self, *bounds: tuple[int, int]) -> Tensor:
        return self._tensor[tuple(slice(*each) for each in bounds)]
