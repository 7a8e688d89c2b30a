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
    """`targets` are the last parts of modules' names; "experts": gate, up and down of every expert. `ranks` and
    `alphas` by a pattern, in place of `rank` and `alpha`. `size` is that of the change beside the weights: large enough
    that drawn tokens differ. `dora`: rows have magnitudes of their own. `stacked`: experts are written as PEFT's
    target_parameters are, all in one matrix."""

    seed: int
    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = EVERY
    use_rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    size: float = 0.6
    dora: bool = False
    stacked: bool = False

    def pairs(self, model: nn.Module) -> dict[str, Pair]:
        """By module."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, weight in self.matrices(model):
            rank = self._matching(self.ranks, name, self.rank)
            down = torch.randn(rank, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], rank, generator=generator)
            if self.stacked and name.endswith(".up_proj"):  # PEFT has one A for gate and up of an expert
                down = found[name.removesuffix("up_proj") + "gate_proj"][0]
            change = self.scale(name) * (up @ down)
            found[name] = (down, up * float(self.size * weight.float().std() / change.std()))
        return found

    def magnitudes(self, model: nn.Module) -> dict[str, Tensor]:
        """[out_features] by module, half to twice as long as the rows are."""
        generator = torch.Generator().manual_seed(self.seed)
        if not self.dora:
            return {}
        return {
            name: weight.float().norm(dim=1) * (0.5 + 1.5 * torch.rand(len(weight), generator=generator))
            for name, weight in self.matrices(model)
        }

    def matrices(self, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """What the adapter changes, as views [out_features, in_features] of the model's weights."""
        for name, module in model.named_modules():
            if name.rpartition(".")[2] not in self.targets:
                continue
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):
                yield name, weight.detach().T if isinstance(module, nn.Embedding) else weight.detach()
            else:
                yield from _experts(name, module)

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
            "rank_pattern": dict(self.ranks), "alpha_pattern": dict(self.alphas), "bias": "none", "use_dora": self.dora,
            "fan_in_fan_out": False, "modules_to_save": None, "inference_mode": True, "init_lora_weights": True,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(self.tensors(model), folder / "adapter_model.safetensors")
        return folder

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """As PEFT names them. It writes embeddings and heads that are adapted beside the adapter."""
        pairs, modules, tensors = self.pairs(model), dict(model.named_modules()), dict[str, Tensor]()
        experts = {name: pair for name, pair in pairs.items() if name not in modules} if self.stacked else {}
        for name, (down, up) in pairs.items():
            module, key = modules.get(name), f"base_model.model.{name}"
            if name in experts:
                continue
            if isinstance(module, nn.Embedding):
                tensors |= {f"{key}.lora_embedding_A": down, f"{key}.lora_embedding_B": up}
            else:
                tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            if isinstance(module, nn.Embedding) or name == "lm_head":
                tensors[f"{key}.base_layer.weight"] = module.weight.detach()  # type: ignore[union-attr]
        for name, magnitude in self.magnitudes(model).items():
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
        tensors |= _stacked(experts)
        return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def merged(self, model: nn.Module) -> nn.Module:
        """A copy of the model, in float32, whose weights are W + scale * B A, each row of its magnitude."""
        result = copy.deepcopy(model).float()
        weights, magnitudes = dict(self.matrices(result)), self.magnitudes(model)
        for name, (down, up) in self.pairs(model).items():
            weights[name] += self.scale(name) * (up @ down)
            if name in magnitudes:
                weights[name] *= (magnitudes[name] / weights[name].norm(dim=1)).unsqueeze(1)
        return result


def _experts(name: str, module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """transformers' experts hold gate over up, and down, of all in one tensor each; checkpoints, and adapters of old,
    have a module for each."""
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()  # type: ignore[union-attr, operator]
    for expert, (wide, tall) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = wide.chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": tall}
        yield from ((f"{name}.{expert}.{part}", matrix) for part, matrix in parts.items())


def _stacked(experts: Mapping[str, Pair]) -> dict[str, Tensor]:
    """One pair for all experts of a layer: A of rank after rank by expert, B of expert after expert by rank. PEFT has
    one A for gate and up: up's is gate's."""
    tensors: dict[str, Tensor] = {}
    layers = dict.fromkeys(name.rsplit(".", 2)[0] for name in experts)
    for layer in layers:
        count = sum(name.startswith(f"{layer}.") for name in experts) // 3
        for part, inner in (("gate_up", ".base_layer"), ("down", "")):
            downs, ups = [], []
            for expert in range(count):
                key = f"{layer}.{expert}."
                names = ("gate_proj", "up_proj") if part == "gate_up" else ("down_proj",)
                downs.append(experts[key + names[0]][0])
                ups.append(torch.cat([experts[key + each][1] for each in names]))
            tensors[f"base_model.model.{layer}{inner}.lora_A.weight"] = torch.cat(downs)
            tensors[f"base_model.model.{layer}{inner}.lora_B.weight"] = torch.stack(ups, dim=2).flatten(1)
    return tensors


FIVE = (
    TinyAdapter(seed=1, rank=1),
    TinyAdapter(seed=2, rank=8, alpha=32.0, use_rslora=True),
    TinyAdapter(seed=3, rank=64),
    TinyAdapter(seed=4, rank=8, targets=("q_proj",)),
    TinyAdapter(seed=5, rank=4, ranks={"v_proj": 16, r"layers\.0\.self_attn\.q_proj": 2}, alphas={"down_proj": 3.0}),
)
"""Ranks 1, 8 and 64, scales of every kind, and one that leaves most products as they are."""
