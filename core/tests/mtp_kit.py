"""Checkpoints with a head of their own (MTP), as DeepSeek V3's are written, and the head's loop over a whole text.

The head's decoder layer is transformers' class of the family; what stands around it is written here from the published
description (arXiv 2412.19437, section 2.2): h' = eh_proj [enorm(embedding of token i + 1); hnorm(h of token i)].
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from anychip_conformance.equality import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from anychip_conformance.equality.tiny_models import make_checkpoint

MODULE = f"model.layers.{NUM_LAYERS}"
WEIGHTS = "model.safetensors"
_BY_LAYER = ("mlp_layer_types", "indexer_types", "layer_types")


def write_mtp(family: str, folder: Path, *, num_heads: int = 1, copies: bool = True, **settings: Any) -> PlainMtp:
    """A model of NUM_LAYERS layers, and `num_heads` layers behind them of which the first is the head that is read.
    `copies`: the checkpoint has an embedding and an output head for them too, of other values, so that it shows if they
    are read."""
    kinds = {"indexer_types": ["full"] * (NUM_LAYERS + num_heads)} if family == "glm-5" else {}
    whole = make_checkpoint(family, folder, **{"num_hidden_layers": NUM_LAYERS + num_heads, **kinds, **settings})
    torch.manual_seed(5)
    own = {
        f"{MODULE}.enorm.weight": 1 + torch.randn(HIDDEN_SIZE) * 0.1,
        f"{MODULE}.hnorm.weight": 1 + torch.randn(HIDDEN_SIZE) * 0.1,
        f"{MODULE}.eh_proj.weight": torch.randn(HIDDEN_SIZE, 2 * HIDDEN_SIZE) * 0.15,
        f"{MODULE}.shared_head.norm.weight": 1 + torch.randn(HIDDEN_SIZE) * 0.1,
    }
    if copies:
        vocabulary = settings.get("vocab_size", VOCAB_SIZE)
        for name in ("embed_tokens", "shared_head.head"):
            own[f"{MODULE}.{name}.weight"] = torch.randn(vocabulary, HIDDEN_SIZE)
    save_file({**load_file(folder / WEIGHTS), **own}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": num_heads}
    config |= {key: config[key][:NUM_LAYERS] for key in _BY_LAYER if config.get(key)}
    (folder / "config.json").write_text(json.dumps(config))
    return PlainMtp(whole, folder, own)


class PlainMtp:
    """`whole` has the head's decoder layer as its layer NUM_LAYERS, `own` the head's other weights."""

    def __init__(self, whole: PreTrainedModel, folder: Path, own: dict[str, Tensor]) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.own = {name.removeprefix(f"{MODULE}."): weight for name, weight in own.items()}
        self.block = copy.deepcopy(whole.model)
        self.block.layers = torch.nn.ModuleList([self.block.layers[NUM_LAYERS]])
        self.block.config.num_hidden_layers = 1
        self.block.norm.weight = torch.nn.Parameter(self.own["shared_head.norm.weight"])
        self.eps = whole.config.rms_norm_eps

    @torch.inference_mode()
    def drafts(self, ids: Sequence[int], count: int) -> list[int]:
        """Greedy guesses behind a text, whose last token the target has not computed."""
        embedding, output = self.target.get_input_embeddings().weight, self.target.get_output_embeddings().weight
        text = list(ids)
        features = self.target.model(torch.tensor([text[:-1]]), use_cache=False).last_hidden_state[0]
        while len(text) < len(ids) + count:
            joined = torch.cat(
                (self.norm("enorm", embedding[torch.tensor(text[1:])]), self.norm("hnorm", features)), dim=-1
            )
            read = linear(joined, self.own["eh_proj.weight"])
            made = self.block(inputs_embeds=read[None], use_cache=False).last_hidden_state[0]
            text.append(int(linear(made[-1], output).argmax()))
            features = torch.cat((features, made[-1:]))
        return text[len(ids) :]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.own[f"{name}.weight"]
