"""Seeded random adapters in PEFT's form, and models that have one merged into their weights: what tokens must equal."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Pair = tuple[Tensor, Tensor]
"""A [rank, in_features] and B [out_features, rank]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyAdapter:
    """`targets` are the last parts of modules' names. `ranks` and `alphas` by a pattern, in place of `rank` and
    `alpha`. `size` is that of the change beside the weights: large enough that drawn tokens differ."""

    seed: int
    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = EVERY
    use_rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    size: float = 0.6

    def pairs(self, model: nn.Module) -> dict[str, Pair]:
        """By module."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, module in self.modules(model):
            rank, weight = self._matching(self.ranks, name, self.rank), module.weight
            assert isinstance(weight, Tensor)
            down = torch.randn(rank, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], rank, generator=generator)
            change = self.scale(name) * (up @ down)
            found[name] = (down, up * float(self.size * weight.detach().float().std() / change.std()))
        return found

    def modules(self, model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in self.targets:
                yield name, module

    def scale(self, module: str) -> float:
        alpha, rank = self._matching(self.alphas, module, self.alpha), self._matching(self.ranks, module, self.rank)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    @staticmethod
    def _matching(patterns: Mapping[str, float], module: str, default: float) -> Any:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    def save(self, model: nn.Module, folder: Path, **changes: Any) -> Path:
        """As PEFT's save_pretrained does; `changes` to adapter_config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA", "base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM", "r": self.rank,
            "lora_alpha": self.alpha, "use_rslora": self.use_rslora, "target_modules": list(self.targets),
            "rank_pattern": dict(self.ranks), "alpha_pattern": dict(self.alphas), "bias": "none", "use_dora": False,
            "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True, "init_lora_weights": True,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        tensors = {}
        for name, (down, up) in self.pairs(model).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    @torch.no_grad()
    def merged(self, model: nn.Module) -> nn.Module:
        """A copy of the model, in float32, whose weights are W + scale * B A."""
        result = copy.deepcopy(model).float()
        weights = dict(result.named_modules())
        for name, (down, up) in self.pairs(model).items():
            module = weights[name]
            assert isinstance(module, nn.Linear)
            module.weight += self.scale(name) * (up @ down)
        return result


FIVE = (
    TinyAdapter(seed=1, rank=1),
    TinyAdapter(seed=2, rank=8, alpha=32.0, use_rslora=True),
    TinyAdapter(seed=3, rank=64),
    TinyAdapter(seed=4, rank=8, targets=("q_proj",)),
    TinyAdapter(seed=5, rank=4, ranks={"v_proj": 16, r"layers\.0\.self_attn\.q_proj": 2}, alphas={"down_proj": 3.0}),
)
"""Ranks 1, 8 and 64, scales of every kind, and one that leaves most products as they are."""
