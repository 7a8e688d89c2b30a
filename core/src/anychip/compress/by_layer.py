"""Runs a transformers model over calibration texts with the weights of one decoder layer at a time.

Needs anychip[transformers]. The memory that it takes is one layer's, the embedding's, and the hidden states of all
texts, which stay on the host between layers. Does not round anything: the caller changes a layer's weights before it
goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from anychip.compress.attention import WATCHED, greatest
from anychip.compress.watching import Watched, watched
from anychip.errors import Unsupported
from anychip.models.transformers_buffers import fill_buffers
from anychip.weights.checkpoint import Checkpoint


@dataclass(slots=True)
class CalibratedLayer:
    """A decoder layer with its weights. `linears` are by the checkpoint's names, in which `seen` has them too; norms of
    `seen.feeds` are modules of `layer`, and `stored_name` gives the checkpoint's name of a parameter of it."""

    layer: nn.Module
    linears: dict[str, nn.Linear]
    seen: Watched
    stored_name: Callable[[str], str]
    greatest_kv: dict[str, tuple[Tensor, Tensor]]
    """By attention module of the whole model, as attention.greatest has them."""
    first_output: Callable[[], Tensor]
    """The layer's output for the first text, with the weights that it has now."""


class LayerByLayer:
    """Raises Unsupported where the model's decoder layers cannot be told apart or be loaded one by one."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device
        config = AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=WATCHED
            ).eval()
        self.name = type(self._model).__name__
        self._layers_name, self._layers = self._decoder_layers(config.num_hidden_layers)
        self._stored = self._stored_names()

    def linear_names(self) -> list[str]:
        """Of the decoder layers' linear layers, as the checkpoint names them; those of experts that the library stacks
        are not among them."""
        return [
            self._stored[f"{name}.weight"].removesuffix(".weight")
            for name, module in self._model.named_modules()
            if type(module) is nn.Linear
            and name.startswith(f"{self._layers_name}.")
            and f"{name}.weight" in self._stored
        ]

    @torch.no_grad()
    def calibrated(self, texts: Sequence[Tensor]) -> Iterator[CalibratedLayer]:
        """The layers in order, over texts [num_tokens] of token ids. What the caller makes of a layer's weights is what
        the layers behind it see."""
        states, arguments = self._first_states(texts)
        for index, layer in enumerate(self._layers):
            prefix = f"{self._layers_name}.{index}"
            self._load(prefix, layer)
            linears = {
                self._stored[f"{prefix}.{name}.weight"].removesuffix(".weight"): module
                for name, module in layer.named_modules()
                if type(module) is nn.Linear
            }
            with watched(layer, linears) as seen:
                for state, given in zip(states, arguments, strict=True):
                    self._run(layer, state, given[index])
            yield CalibratedLayer(
                layer,
                linears,
                seen,
                stored_name=partial(self._stored_name, prefix),
                greatest_kv={f"{prefix}.{name}": found for name, found in greatest(layer).items()},
                first_output=partial(self._run, layer, states[0], arguments[0][index]),
            )
            states = [self._run(layer, state, given[index]) for state, given in zip(states, arguments, strict=True)]
            layer.to_empty(device="meta")

    def _stored_name(self, prefix: str, name: str) -> str:
        return self._stored[f"{prefix}.{name}"]

    def _run(self, layer: nn.Module, state: Tensor, arguments: dict[str, Any]) -> Tensor:
        result = layer(state.to(self._device), **arguments)
        hidden: Tensor = result[0] if isinstance(result, tuple) else result
        return hidden.cpu()

    def _first_states(self, texts: Sequence[Tensor]) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
        """By text, what the first layer reads, and by layer, what else the layers are called with."""
        base = getattr(self._model, self._model.base_model_prefix)
        parent, _, leaf = self._layers_name.rpartition(".")
        within = {id(module) for module in self._layers.modules()}
        for name, module in self._model.named_modules():
            if id(module) not in within:
                self._load(name, module, recurse=False)
        for name, held in fill_buffers(self._model, self._device).items():
            if name in self._stored:
                held.copy_(self._checkpoint.read(self._stored[name]))
        recorders = [_Recorder(layer) for layer in self._layers]
        setattr(self._model.get_submodule(parent), leaf, nn.ModuleList(recorders))
        states, arguments = [], []
        for ids in texts:
            base(input_ids=ids.unsqueeze(0).to(self._device), use_cache=False)
            states.append(recorders[0].state.cpu())
            arguments.append([recorder.arguments for recorder in recorders])
        setattr(self._model.get_submodule(parent), leaf, self._layers)
        return states, arguments

    def _load(self, prefix: str, module: nn.Module, *, recurse: bool = True) -> None:
        """Weights of a module out of the checkpoint. Raises Unsupported for one that has another form there."""
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            whole = f"{prefix}.{name}" if prefix else name
            stored = self._stored.get(whole)
            if stored is None and whole.startswith("lm_head"):
                continue
            if stored is None:
                raise Unsupported(
                    f"calibration of {self.name}",
                    [f"the checkpoint has no tensor for {whole} {list(parameter.shape)}; use --method rtn"],
                )
            held = self._checkpoint.read(stored).to(device=self._device, dtype=self._model.dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, nn.Parameter(held, requires_grad=False))

    def _decoder_layers(self, count: int) -> tuple[str, nn.ModuleList]:
        for name, module in self._model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return name, module
        raise Unsupported(f"calibration of {self.name}", [f"it has no list of its {count} decoder layers"])

    def _stored_names(self) -> dict[str, str]:
        """The checkpoint's name of each parameter: the library has renamed modules since some were written."""
        renamings = [r for r in get_model_conversion_mapping(self._model) if isinstance(r, WeightRenaming)]
        found = {}
        for stored in self._checkpoint.names:
            name = stored
            for renaming in renamings:
                name = renaming.rename_source_key(name)[0]
            found[name] = stored
        return found


class _Recorder(nn.Module):
    """Stands for a layer, and keeps what it is called with. What the model's loop asks its layers for is the layer's
    own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: its parameters stay the model's
        self.state = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, state: Tensor, **arguments: Any) -> Tensor:
        self.state, self.arguments = state, arguments
        return state

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_modules", {}) or name == "_layer":
            return super().__getattr__(name)
        return getattr(self.__dict__["_layer"][0], name)
