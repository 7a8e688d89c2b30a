"""One of transformers' classes with a config, as its own code builds it on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anychip.errors import AnychipError, Unsupported
from anychip.models.transformers_adapters import ADAPTERS, adapt
from anychip.models.transformers_attention import ATTENTION, AttentionCall, AttentionRecorder, give
from anychip.models.transformers_experts import EXPERTS_FUNCTION, record_experts
from anychip.models.transformers_rope import hold_still

_TOKENS = 3
"""Of the forward pass that is recorded."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a forward pass asks for: calls of attention in their order, and how many experts each module picks for a
    token."""

    attention: list[AttentionCall]
    top_k: dict[str, int]


@dataclass(frozen=True, slots=True)
class LibraryClass:
    """`plan`: of tensor parallelism, patterns of module names to styles, in the whole model's names."""

    config: Any
    cls: type[Any]
    plan: dict[str, str]

    @property
    def who(self) -> str:
        return f"{self.cls.__name__} through transformers"

    def build(self, dtype: str, device: str) -> PreTrainedModel:
        """On the meta device, its attention and experts sent to ours. `device`: where the rest will lie."""
        adapter = ADAPTERS.get(self.cls.__name__)
        with self.blamed("as it was built"), torch.device("meta"):
            model: PreTrainedModel = self.cls._from_config(
                self.config,
                # Some classes that have no interface choose theirs by a list of their own; masks follow the config.
                attn_implementation=ATTENTION if adapter is None else "eager",
                experts_implementation=EXPERTS_FUNCTION,
                dtype=getattr(torch, dtype),
            ).eval()
            if adapter is not None:
                model.config._attn_implementation = ATTENTION
                adapt(model, adapter, device)
            return model

    def decoder(self, model: PreTrainedModel, device: str) -> Decoder:
        """What turns ids into hidden states."""
        base: nn.Module = getattr(model, self.base_name(model))
        inner = getattr(base, "decoder", None)
        wraps = not {"input_ids", "inputs_embeds"} & set(inspect.signature(base.forward).parameters)
        return Decoder(self, inner if wraps and inner is not None else base, device)

    def base_name(self, model: PreTrainedModel) -> str:
        """Of the model's child that holds the decoder. Raises Unsupported where there is none."""
        named = (model.base_model_prefix, "model", "transformer")
        found = next((name for name in named if isinstance(getattr(model, name, None), nn.Module)), None)
        if found is None:
            raise Unsupported(self.who, [f"it has no decoder under the names {', '.join(named)}"])
        return found

    def record(self) -> Recorded:
        """Raises Unsupported for what the code asks of attention that core has not, and where it cannot be asked."""
        try:
            return self._record("meta")
        except Unsupported as refusal:
            if not isinstance(refusal.__cause__, NotImplementedError):
                raise
            return self._record("cpu")  # it looks at values, which there are none of on the meta device

    def _record(self, device: str) -> Recorded:
        model = self.build("float32", device)
        if device != "meta":
            _fill_with_zeros(model)
        names = {id(module): name for name, module in model.named_modules()}
        recorder = AttentionRecorder(names)
        give(model, recorder)
        top_k = record_experts(model, names)
        hold_still(model, None)
        with self.blamed("as it was looked at"):
            decoder = self.decoder(model, device)
        ids, positions = (torch.zeros(_TOKENS, dtype=torch.int64, device=device) for _ in range(2))
        with self.blamed("as it ran"), torch.no_grad():
            decoder(positions, input_ids=ids.unsqueeze(0))
        return Recorded(recorder.calls, top_k)

    @contextmanager
    def blamed(self, when: str) -> Iterator[None]:
        """Raises Unsupported in place of whatever the library's code raises."""
        try:
            yield
        except (AnychipError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Unsupported(self.who, [f"its code raised {type(error).__name__} {when}: {error}"]) from error


def _fill_with_zeros(model: nn.Module) -> None:
    """In place of what is on the meta device; every value of a parameter is the same zero in memory."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


class Decoder:
    """Calls a decoder of the library for the tokens of a step, as if they were one sequence."""

    def __init__(self, library: LibraryClass, module: nn.Module, device: str) -> None:
        """Raises Unsupported for one that cannot be told positions."""
        self.module = module
        self._positions: Tensor | None = None
        taken = inspect.signature(module.forward).parameters
        every = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
        adapter = ADAPTERS.get(library.cls.__name__)
        self._by_argument = "position_ids" in taken
        told = self._by_argument or (adapter is not None and adapter.slopes is not None) or self._tell_embeddings()
        if not told:
            raise Unsupported(library.who, ["its code takes no positions"])
        # A mask of four dimensions is taken as finished: the library neither builds one nor looks at positions for it.
        mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        settings: dict[str, Any] = {"use_cache": False}
        if adapter is None or adapter.mask:
            settings["attention_mask"] = mask
        self._settings = {name: value for name, value in settings.items() if name in taken or every}

    def __call__(self, positions: Tensor, **inputs: Any) -> Any:
        """`positions` [num_tokens]; `inputs` are input_ids or inputs_embeds."""
        if self._by_argument:
            inputs["position_ids"] = positions.unsqueeze(0).long()
        else:
            self._positions = positions.long()
        return self.module(**inputs, **self._settings)

    def _tell_embeddings(self) -> bool:
        """Where the decoder counts positions itself, its position embeddings are given the step's instead."""
        found = False
        for module in self.module.modules():
            if "position_ids" in inspect.signature(module.forward).parameters and "Positional" in type(module).__name__:
                own = module.forward
                module.forward = lambda *others, own=own, **named: own(None, position_ids=self._positions)
                found = True
        return found
