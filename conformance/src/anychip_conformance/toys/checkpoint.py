"""A toy's checkpoint on disk, and the plainest evaluation of it: whole sequences, token by token where it can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from anychip_conformance.equality import HIDDEN_SIZE, VOCAB_SIZE
from anychip_conformance.toys import ARCHITECTURE, TOYS

HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, WIDTH = 4, 2, 16, 128, 64
LATENT_DIM, NOPE_DIM, V_DIM, WINDOW = 48, 16, 24, 32
THETA, EPS, SPREAD = 10000.0, 1e-6, 0.15


def make_toy(name: str, folder: Path) -> ToyOracle:
    """Writes the toy of this name, and returns what judges it."""
    kinds = TOYS[name]
    torch.manual_seed(list(TOYS).index(name))
    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB_SIZE, HIDDEN_SIZE),
        "model.norm.weight": 1 + torch.randn(HIDDEN_SIZE) * 0.1,
        "lm_head.weight": torch.randn(VOCAB_SIZE, HIDDEN_SIZE) * SPREAD,
    }
    for index, kind in enumerate(kinds):
        base = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{base}.{norm}.weight"] = 1 + torch.randn(HIDDEN_SIZE) * 0.1
        shapes = {
            "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN_SIZE),
            "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN_SIZE),
            "mlp.down_proj.weight": (HIDDEN_SIZE, INTERMEDIATE),
            **_MIXER_SHAPES[kind],
        }
        weights |= {f"{base}.{part}": torch.randn(shape) * SPREAD for part, shape in shapes.items()}
    config = {
        "architectures": [ARCHITECTURE],
        "layer_kinds": kinds,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "sliding_window": WINDOW,
        "state_width": WIDTH,
        "latent_dim": LATENT_DIM,
        "nope_dim": NOPE_DIM,
        "v_dim": V_DIM,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "torch_dtype": "float32",
        "eos_token_id": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return ToyOracle(weights, kinds)


_ATTENTION_SHAPES = {
    "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN_SIZE),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "self_attn.o_proj.weight": (HIDDEN_SIZE, HEADS * HEAD_DIM),
}
_MIXER_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "full": _ATTENTION_SHAPES,
    "window": _ATTENTION_SHAPES,
    "state": {
        "mixer.x_proj.weight": (WIDTH, HIDDEN_SIZE),
        "mixer.gate_proj.weight": (WIDTH, HIDDEN_SIZE),
        "mixer.o_proj.weight": (HIDDEN_SIZE, WIDTH),
    },
    "latent": {
        "mixer.q_proj.weight": (HEADS * (NOPE_DIM + HEAD_DIM), HIDDEN_SIZE),
        "mixer.row_proj.weight": (LATENT_DIM + HEAD_DIM, HIDDEN_SIZE),
        "mixer.o_proj.weight": (HIDDEN_SIZE, HEADS * V_DIM),
        "mixer.k_up": (HEADS, NOPE_DIM, LATENT_DIM),
        "mixer.v_up": (HEADS, V_DIM, LATENT_DIM),
    },
}


class ToyOracle:
    """Called as transformers' models are: ids [1, length] -> logits [1, length, vocab_size], nothing kept between."""

    def __init__(self, weights: dict[str, Tensor], kinds: tuple[str, ...]) -> None:
        self.config = SimpleNamespace(num_hidden_layers=len(kinds), hidden_size=HIDDEN_SIZE)
        self._weights = weights
        self._kinds = kinds

    def __call__(self, ids: Tensor, *, use_cache: bool) -> SimpleNamespace:
        hidden = self._weights["model.embed_tokens.weight"][ids[0]]
        mixers: dict[str, Callable[[Tensor, str], Tensor]] = {
            "full": lambda x, base: self._attention(x, base, None),
            "window": lambda x, base: self._attention(x, base, WINDOW),
            "state": self._state,
            "latent": self._latent,
        }
        for index, kind in enumerate(self._kinds):
            base = f"model.layers.{index}"
            hidden = hidden + mixers[kind](self._norm(hidden, f"{base}.input_layernorm"), base)
            x = self._norm(hidden, f"{base}.post_attention_layernorm")
            gated = F.silu(self._product(x, f"{base}.mlp.gate_proj")) * self._product(x, f"{base}.mlp.up_proj")
            hidden = hidden + self._product(gated, f"{base}.mlp.down_proj")
        logits = self._product(self._norm(hidden, "model.norm"), "lm_head")
        return SimpleNamespace(logits=logits.unsqueeze(0))

    def _product(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self._weights[f"{name}.weight"]

    def _state(self, x: Tensor, base: str) -> Tensor:
        added, kept = self._product(x, f"{base}.mixer.x_proj"), self._product(x, f"{base}.mixer.gate_proj").sigmoid()
        last, sums = torch.zeros(WIDTH), []
        for token in range(len(x)):
            last = kept[token] * last + added[token]
            sums.append(last)
        return self._product(torch.stack(sums), f"{base}.mixer.o_proj")

    def _attention(self, x: Tensor, base: str, window: int | None) -> Tensor:
        q, k, v = (
            self._product(x, f"{base}.self_attn.{part}_proj").view(len(x), -1, HEAD_DIM) for part in ("q", "k", "v")
        )
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (_rotated(k), v))
        attended = _attend(_rotated(q), k, v, window)
        return self._product(attended.flatten(1), f"{base}.self_attn.o_proj")

    def _latent(self, x: Tensor, base: str) -> Tensor:
        query = self._product(x, f"{base}.mixer.q_proj").view(len(x), HEADS, -1)
        row = self._product(x, f"{base}.mixer.row_proj")
        latent, k_rope = row[:, :LATENT_DIM], _rotated(row[:, LATENT_DIM:].unsqueeze(1)).expand(-1, HEADS, -1)
        keys, values = (
            torch.einsum("tc,hdc->thd", latent, self._weights[f"{base}.mixer.{part}"]) for part in ("k_up", "v_up")
        )
        q = torch.cat((query[..., :NOPE_DIM], _rotated(query[..., NOPE_DIM:])), dim=-1)
        attended = _attend(q, torch.cat((keys, k_rope), dim=-1), values, None)
        return self._product(attended.flatten(1), f"{base}.mixer.o_proj")


def _rotated(x: Tensor) -> Tensor:
    """[length, heads, HEAD_DIM], each token by its place."""
    frequencies = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(len(x)).float(), frequencies).unsqueeze(1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    places = torch.arange(len(q))
    hidden = places > places.unsqueeze(-1)
    if window is not None:
        hidden = hidden | (places <= places.unsqueeze(-1) - window)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v)
