"""Heads of ...ForSequenceClassification: which tensors make labels of a pooled vector, by family."""

from __future__ import annotations

from typing import NamedTuple

from anychip.errors import Unsupported
from anychip.family_defaults import base_architecture, is_encoder
from anychip.model_config import ModelConfig
from anychip.prompt_extras import PoolingKind
from anychip.tasks.served import LabelActivation, Stage, StageActivation

_LABEL_ACTIVATIONS: dict[str, LabelActivation] = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_PROBLEMS: dict[str, LabelActivation] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "identity",
}


class Head(NamedTuple):
    pooling: PoolingKind
    stages: tuple[Stage, ...]


def head_of(model: ModelConfig) -> Head:
    """Of a checkpoint whose architecture ends with ForSequenceClassification. Raises Unsupported for a family whose
    head is not known."""
    base = base_architecture(model.architecture)
    if not is_encoder(model.architecture):
        return Head("last", (_linear("score", bias=False),))
    if base == "BertModel":
        return Head("cls", (_linear("bert.pooler.dense", "tanh"), _linear("classifier")))
    if base in ("RobertaModel", "XLMRobertaModel", "MPNetModel"):
        return Head("cls", (_linear("classifier.dense", "tanh"), _linear("classifier.out_proj")))
    if base == "DistilBertModel":
        return Head("cls", (_linear("pre_classifier", "relu"), _linear("classifier")))
    if base == "ModernBertModel":
        return _modernbert(model)
    raise Unsupported(model.architecture, ["its classifier is not known"])


def _modernbert(model: ModelConfig) -> Head:
    pooling, activation = model.get("classifier_pooling", "cls"), model.get("classifier_activation", "gelu")
    if pooling not in ("cls", "mean") or activation not in ("gelu", "relu", "silu"):
        raise Unsupported(model.architecture, [f"classifier_pooling {pooling!r}, classifier_activation {activation!r}"])
    norm = Stage(
        weight="head.norm.weight",
        bias="head.norm.bias" if model.get("norm_bias", False) else None,
        norm_eps=float(model.get("norm_eps", 1e-5)),
    )
    dense = _linear("head.dense", activation, bias=bool(model.get("classifier_bias", False)))
    return Head(pooling, (dense, norm, _linear("classifier")))


def _linear(name: str, activation: StageActivation = "identity", *, bias: bool = True) -> Stage:
    return Stage(weight=f"{name}.weight", bias=f"{name}.bias" if bias else None, activation=activation)


def labels_of(model: ModelConfig) -> tuple[str, ...]:
    """By index. Without id2label in config.json transformers takes two labels, or num_labels of them."""
    named = model.get("id2label")
    if named:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    return tuple(f"LABEL_{index}" for index in range(int(model.get("num_labels") or 2)))


def activation_of(model: ModelConfig, named: str | None) -> LabelActivation:
    """`named` is a cross-encoder's activation by torch's name, where its files have one; then the problem's; then what
    transformers does: one label is a probability of its own, several share one. Raises Unsupported."""
    own = model.get("sentence_transformers") or {}
    named = named or own.get("activation_fn") or model.get("sbert_ce_default_activation_function")
    if named is not None:
        found = _LABEL_ACTIVATIONS.get(str(named).rpartition(".")[2])
        if found is None or not str(named).startswith("torch."):
            raise Unsupported(model.architecture, [f"activation {named} of a classifier"])
        return found
    problem = model.get("problem_type")
    if problem is not None:
        if problem not in _PROBLEMS:
            raise Unsupported(model.architecture, [f"problem_type {problem!r}; known are {', '.join(_PROBLEMS)}"])
        return _PROBLEMS[problem]
    return "sigmoid" if len(labels_of(model)) == 1 else "softmax"
