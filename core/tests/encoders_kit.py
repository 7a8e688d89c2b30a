"""Tiny seeded encoders with transformers' classes as their oracle, and a tokenizer of words for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = [f"w{number}" for number in range(90)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SIZES = {"vocab_size": 95, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_WIDE = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 160}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": _WIDE,
    "Roberta": {**_WIDE, "pad_token_id": 0, "type_vocab_size": 1},
    "XLMRoberta": {**_WIDE, "pad_token_id": 1, "type_vocab_size": 1},
    "DistilBert": {
        "vocab_size": 95, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 160,
    },
    "MPNet": {**_WIDE, "max_position_embeddings": 302},
    "ModernBert": {
        **_WIDE, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "NomicBert": _WIDE,
}  # fmt: skip
"""Configurations by family."""


def make_encoder(family: str, folder: Path, *, labels: int = 0, seed: int = 0, **more: Any) -> torch.nn.Module:
    """Saves a model of random weights with its tokenizer, and returns it; with `labels`, a classifier."""
    torch.manual_seed(seed)
    if labels:
        more = {**more, "num_labels": labels}
    config = getattr(transformers, f"{family}Config")(**{**ENCODERS[family], **more})
    kind = "ForSequenceClassification" if labels else "Model"
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():  # weights of the usual size would hide what is wrong
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder, segments=family == "Bert")
    return model


def make_tokenizer(folder: Path, *, segments: bool = True) -> None:
    """`segments`: a pair's second text has tokens of another type, as BERT's has."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    second = 1 if segments else 0
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    raw.enable_truncation(7)  # what a trainer may have left there
    raw.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def text_of(length: int, seed: int = 0) -> str:
    """So many words."""
    return " ".join(WORDS[(seed * 31 + at * 37) % len(WORDS)] for at in range(length))


def ids_of(text: str) -> list[int]:
    return [2, *(len(SPECIAL) + WORDS.index(word) for word in text.split()), 3]


def pair_of(first: str, second: str) -> tuple[list[int], list[int]]:
    """Ids and types."""
    ids, rest = ids_of(first), ids_of(second)[1:]
    return ids + rest, [0] * len(ids) + [1] * len(rest)


@torch.inference_mode()
def hidden_states(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """[length, hidden_size] of one text alone."""
    states: torch.Tensor = model(torch.tensor([ids])).last_hidden_state[0]
    return states


@torch.inference_mode()
def logits_of(model: torch.nn.Module, ids: Sequence[int], types: Sequence[int] | None = None) -> torch.Tensor:
    """[num_labels] of one text alone."""
    more = {} if types is None else {"token_type_ids": torch.tensor([types])}
    logits: torch.Tensor = model(torch.tensor([ids]), **more).logits[0]
    return logits


def describe_modules(folder: Path, pooling: str = "mean", *, normalize: bool = True, **settings: Any) -> None:
    """sentence-transformers' files: a pooling, and whether vectors have length 1; `settings` of
    config_sentence_transformers.json."""
    kinds = ["Transformer", "Pooling"] + (["Normalize"] if normalize else [])
    modules = [
        {
            "idx": at,
            "name": str(at),
            "path": f"{at}_{kind}" if at else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for at, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    fields = {f"pooling_mode_{field}": name == pooling for name, field in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **fields}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
