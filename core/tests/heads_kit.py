"""Heads with random weights, as training frameworks write them, and their loop over a whole text in plain torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from anychip_conformance.equality import HIDDEN_SIZE, VOCAB_SIZE

HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4, 2, 16, 96
NUM_DRAFT_TOKENS = 200
EPS, THETA = 1e-5, 10000.0

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
"""Of a head for the suite's tiny models; texts are longer than its positions, as they are for heads in the wild."""


def layer_weights(name: str, reads: int) -> dict[str, Tensor]:
    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) * 0.15

    return {
        f"{name}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, reads),
        f"{name}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, reads),
        f"{name}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, reads),
        f"{name}.self_attn.o_proj.weight": matrix(HIDDEN_SIZE, HEADS * HEAD_DIM),
        f"{name}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN_SIZE),
        f"{name}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN_SIZE),
        f"{name}.mlp.down_proj.weight": matrix(HIDDEN_SIZE, INTERMEDIATE),
        f"{name}.post_attention_layernorm.weight": 1 + torch.randn(HIDDEN_SIZE) * 0.1,
    }


def norm_weight() -> Tensor:
    return 1 + torch.randn(HIDDEN_SIZE) * 0.1


def write_eagle3(
    folder: Path,
    *,
    layers: Sequence[int] | None = (0, 1, 2),
    own_embedding: bool = False,
    lacks: str = "",
    first_token: int = 0,
    written_as: str = "",
    **changes: Any,
) -> dict[str, Tensor]:
    """`layers` None: the config names none. `first_token` is added to the ids of the tokens that it drafts, and
    `changes` go into its config. The checkpoint calls its layer `written_as`, and begins all names with "model.", where
    that is given. Returns the weights."""
    torch.manual_seed(3)
    kept = torch.randperm(VOCAB_SIZE)[:NUM_DRAFT_TOKENS].sort().values
    weights = layer_weights("midlayer", 2 * HIDDEN_SIZE) | {
        "midlayer.hidden_norm.weight": norm_weight(),
        "midlayer.input_layernorm.weight": norm_weight(),
        "norm.weight": norm_weight(),
        "fc.weight": torch.randn(HIDDEN_SIZE, 3 * HIDDEN_SIZE) * 0.15,
        "lm_head.weight": torch.randn(NUM_DRAFT_TOKENS, HIDDEN_SIZE) * 0.3,
        "d2t": kept + first_token - torch.arange(NUM_DRAFT_TOKENS),
        "t2d": torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill_(0, kept, True),
    }
    if own_embedding:
        weights["embed_tokens.weight"] = torch.randn(VOCAB_SIZE, HIDDEN_SIZE)
    config = CONFIG | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": NUM_DRAFT_TOKENS}
    if layers is not None:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(layers)}
    weights.pop(lacks, None)
    written = weights
    if written_as:
        written = {f"model.{name.replace('midlayer', written_as)}": weight for name, weight in weights.items()}
    write(folder, config | changes, written)
    return weights


def write_eagle1(folder: Path, *, num_layers: int = 1, bias: bool = False, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    weights = {"fc.weight": torch.randn(HIDDEN_SIZE, 2 * HIDDEN_SIZE) * 0.15}
    if bias:
        weights["fc.bias"] = torch.randn(HIDDEN_SIZE) * 0.3
    for index in range(num_layers):
        weights |= layer_weights(f"layers.{index}", HIDDEN_SIZE)
        if index:
            weights[f"layers.{index}.input_layernorm.weight"] = norm_weight()
    return write(folder, CONFIG | {"num_hidden_layers": num_layers} | changes, weights)


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


# -- in plain torch -----------------------------------------------------------------------------------------


class PlainHead:
    """`embedding` [vocab_size, hidden_size] and `output` [vocab_size, hidden_size] are the target's; an EAGLE-3 head
    has an output of its own."""

    def __init__(self, weights: dict[str, Tensor], embedding: Tensor, output: Tensor) -> None:
        self.weights = weights
        self.is_eagle3 = "midlayer.hidden_norm.weight" in weights
        self.embedding = weights.get("embed_tokens.weight", embedding)
        self.output = output

    def drafts(self, ids: Sequence[int], taps: Sequence[Tensor], count: int) -> list[int]:
        """Greedy guesses behind a text, whose last token the target has not computed. `taps` are the target's hidden
        states of all others, [len(ids) - 1, hidden_size] each."""
        text, features = list(ids), taps[0]
        if self.is_eagle3:
            features = linear(torch.cat(tuple(taps), dim=-1), self.weights["fc.weight"])
        while len(text) < len(ids) + count:
            made, logits = self.run(torch.tensor(text[1:]), features)
            text.append(int(logits[-1].argmax()))
            features = torch.cat((features, made[-1:]))
        return text[len(ids) :]

    def run(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the head makes of each position, and its logits."""
        weights, embedded = self.weights, self.embedding[ids]
        if not self.is_eagle3:
            hidden = linear(torch.cat((embedded, features), dim=-1), weights["fc.weight"], weights.get("fc.bias"))
            for index in range(sum(name.endswith("o_proj.weight") for name in weights)):
                norm = weights.get(f"layers.{index}.input_layernorm.weight")
                read = hidden if norm is None else rms_norm(hidden, norm)
                hidden = self.layer(f"layers.{index}", read, hidden)
            return hidden, linear(hidden, self.output)
        read = torch.cat(
            (
                rms_norm(embedded, weights["midlayer.input_layernorm.weight"]),
                rms_norm(features, weights["midlayer.hidden_norm.weight"]),
            ),
            dim=-1,
        )
        hidden = self.layer("midlayer", read, features)
        drafted = linear(rms_norm(hidden, weights["norm.weight"]), weights["lm_head.weight"])
        logits = torch.full((len(ids), len(self.embedding)), float("-inf"))
        logits[:, weights["d2t"] + torch.arange(drafted.shape[1])] = drafted
        return hidden, logits

    def layer(self, name: str, read: Tensor, residual: Tensor) -> Tensor:
        def project(module: str, x: Tensor) -> Tensor:
            return linear(x, self.weights[f"{name}.{module}.weight"])

        count = len(read)
        q, k, v = (project(f"self_attn.{each}_proj", read).view(count, -1, HEAD_DIM).transpose(0, 1) for each in "qkv")
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=0) for each in (rotated(k), v))
        scores = rotated(q) @ k.transpose(1, 2) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1)
        residual = residual + project("self_attn.o_proj", attended)
        x = rms_norm(residual, self.weights[f"{name}.post_attention_layernorm.weight"])
        return residual + project("mlp.down_proj", silu(project("mlp.gate_proj", x)) * project("mlp.up_proj", x))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotated(x: Tensor) -> Tensor:
    """[heads, num_tokens, head_dim], turned by the tokens' places."""
    angles = torch.arange(x.shape[1])[:, None] * THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# -- Medusa -------------------------------------------------------------------------------------------------


def write_medusa(
    folder: Path, *, num_heads: int = 4, own_outputs: bool = True, truncated: bool = True, **changes: Any
) -> dict[str, Tensor]:
    """As vLLM's converter does. Returns the weights."""
    torch.manual_seed(5)
    rows = NUM_DRAFT_TOKENS if truncated and own_outputs else VOCAB_SIZE
    weights = dict[str, Tensor]()
    for head in range(num_heads):
        weights[f"blocks.{head}.layers.0.weight"] = torch.randn(HIDDEN_SIZE, HIDDEN_SIZE) * 0.15
        weights[f"blocks.{head}.layers.0.bias"] = torch.randn(HIDDEN_SIZE) * 0.1
        if own_outputs:
            weights[f"lm_heads.{head}.weight"] = torch.randn(rows, HIDDEN_SIZE) * 0.3
    if rows < VOCAB_SIZE:
        weights["token_map"] = torch.randperm(VOCAB_SIZE)[:rows]
    config = {
        "architectures": ["MedusaModel"],
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "truncated_vocab_size": rows,
        "num_heads": num_heads,
        "num_hidden_layers": 1,
        "original_lm_head": not own_outputs,
    }
    return write(folder, config | changes, weights)


def medusa_drafts(weights: dict[str, Tensor], hidden: Tensor, output: Tensor, count: int) -> list[int]:
    """Guesses behind a text. `hidden` is the target's final hidden state of the token before its last one."""
    ids = []
    for head in range(count):
        layer = weights[f"blocks.{head}.layers.0.weight"], weights[f"blocks.{head}.layers.0.bias"]
        row = int(
            linear(hidden + silu(linear(hidden, *layer)), weights.get(f"lm_heads.{head}.weight", output)).argmax()
        )
        ids.append(int(weights["token_map"][row]) if "token_map" in weights else row)
    return ids
