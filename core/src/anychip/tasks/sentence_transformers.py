"""Reads the files that sentence-transformers saves beside a model: modules, pooling, dense layers, prompts. What is not
understood is refused by its name.

Source: sentence-transformers' documentation of modules.json and of each module's config.json, versions 2 to 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from anychip.errors import CheckpointError, Unsupported
from anychip.prompt_extras import PoolingKind
from anychip.tasks.served import Stage, StageActivation

MODULES = "modules.json"

_POOLING: dict[str, PoolingKind] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, StageActivation] = {
    "Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu", "Sigmoid": "sigmoid",
}  # fmt: skip
_TRANSFORMER = {
    "max_seq_length": None,
    "do_lower_case": None,
    "transformer_task": ("feature-extraction", "sequence-classification", "text-generation"),
    "module_output_name": ("token_embeddings", "scores", "causal_logits"),
    "modality_config": None,
    "unpad_inputs": None,
}
"""Fields of sentence_bert_config.json, and the values that are understood; None: any."""
_POOLED = "sentence_embedding"
"""What modules of a pooled vector read and write."""


class Described(NamedTuple):
    """`kind` is SentenceTransformer or CrossEncoder."""

    kind: str
    pooling: PoolingKind | None
    stages: tuple[Stage, ...]
    normalize: bool
    size: int | None
    prompts: dict[str, str]
    default_prompt: str | None
    similarity: str
    max_length: int | None
    lower_case: bool
    activation: str | None
    """A cross-encoder's, by torch's name."""
    answers: tuple[int, ...]
    """Tokens whose logits are a decoder's score: one, or one less another; (): it has none."""
    in_template: bool
    """Whether the chat template makes a prompt of a pair."""


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no file. Raises CheckpointError for what is none."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} holds no JSON object: {error}") from error


def described(folder: Path) -> Described:
    """Raises Unsupported for what is not understood, CheckpointError for files that are broken."""
    settings = read_object(folder / "config_sentence_transformers.json")
    kind = str(settings.get("model_type") or "SentenceTransformer")
    if kind not in ("SentenceTransformer", "CrossEncoder"):
        raise _refused(folder, f"model_type {kind!r}; known are SentenceTransformer and CrossEncoder")
    text = _text_settings(folder)
    pooling: PoolingKind | None = None
    stages: list[Stage] = []
    normalize, size = False, None
    answers: tuple[int, ...] = ()
    for number, (name, path) in enumerate(_modules(folder)):
        own = read_object(folder / path / "config.json") if path else {}
        if normalize and name != "Normalize":
            raise _refused(folder, f"module {name} behind Normalize")
        if number == 0:
            if name != "Transformer" or path not in ("", "."):
                raise _refused(folder, f"first module {name} in {path or '.'!r}; expected Transformer in '.'")
        elif name == "Pooling":
            pooling = _pooling_kind(folder, path, own)
        elif name == "Dense":
            size = int(own.get("out_features") or 0)
            stages.append(_dense(folder, path, own))
        elif name == "LayerNorm":
            stages.append(Stage(weight="norm.weight", bias="norm.bias", file=_weights(folder, path), norm_eps=1e-5))
        elif name == "Normalize":
            if {*own.values()} - {_POOLED}:
                raise _refused(folder, f"Normalize of {own}")
            normalize = True
        elif name == "LogitScore":
            answers = _answers(folder, path, own)
        elif name != "Dropout":
            raise _refused(folder, f"module {name}")
    if kind == "SentenceTransformer" and pooling is None:
        raise _refused(folder, "no module Pooling: a vector for every token is not served")
    return Described(
        kind=kind,
        pooling=pooling,
        stages=tuple(stages),
        normalize=normalize,
        size=size,
        prompts=_prompts(folder, settings),
        default_prompt=settings.get("default_prompt_name"),
        similarity=str(settings.get("similarity_fn_name") or "cosine"),
        max_length=text.get("max_seq_length"),
        lower_case=bool(text.get("do_lower_case", False)),
        activation=settings.get("activation_fn"),
        answers=answers,
        in_template=_in_template(folder, text, answers),
    )


def _in_template(folder: Path, text: Mapping[str, Any], answers: tuple[int, ...]) -> bool:
    """Whether pairs are messages, which only a model that answers takes."""
    messages = dict(text.get("modality_config") or {}).get("message")
    if bool(answers) != (text.get("transformer_task") == "text-generation") or (messages and not answers):
        raise _refused(folder, "a model that draws text, without LogitScore behind it, or LogitScore behind another")
    if messages and messages.get("format", "flat") != "flat":
        raise _refused(folder, f"messages of format {messages['format']!r}; known is flat")
    return bool(messages)


def _answers(folder: Path, path: str, own: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that say yes and no, of which the second may lack."""
    tokens = [own[name] for name in ("true_token_id", "false_token_id") if own.get(name) is not None]
    if own.get("true_token_id") is None or any(not isinstance(token, int) or token < 0 for token in tokens):
        raise _refused(folder, f"{path}: tokens {own}")
    if own.get("module_input_name", "causal_logits") != "causal_logits":
        raise _refused(folder, f"{path}: module_input_name {own['module_input_name']!r}")
    return tuple(tokens)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(last part of the type's name, path) of each."""
    path = folder / MODULES
    try:
        listed = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
        found = [(str(each["type"]), str(each["path"])) for each in listed]
    except (msgspec.MsgspecError, KeyError) as error:
        raise CheckpointError(f"{path} is no list of modules: {error}") from error
    for kind, _ in found:
        if not kind.startswith("sentence_transformers."):
            raise _refused(folder, f"module {kind}, which is code of its own")
    return [(kind.rpartition(".")[2], where) for kind, where in found]


def _text_settings(folder: Path) -> Mapping[str, Any]:
    path = folder / "sentence_bert_config.json"
    found = read_object(path)
    for name, value in found.items():
        if value in (None, {}, []):
            continue
        if name not in _TRANSFORMER:
            raise _refused(folder, f"{path.name}: {name}")
        known = _TRANSFORMER[name]
        if known is not None and value not in known:
            raise _refused(folder, f"{path.name}: {name} {value!r}; known are {', '.join(known)}")
        if name == "modality_config" and not {"text"} <= {*value} <= {"text", "message"}:
            raise _refused(folder, f"{path.name}: modalities {', '.join(value)}; known is text, and messages of it")
    return found


def _pooling_kind(folder: Path, path: str, own: Mapping[str, Any]) -> PoolingKind:
    mode = own.get("pooling_mode")
    modes = [name for field, name in _OLD_POOLING.items() if own.get(field)] if mode is None else mode
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise _refused(folder, f"{path}: pooling {' + '.join(modes) or 'none'}; known is one of {', '.join(_POOLING)}")
    if own.get("include_prompt") is False:
        raise _refused(folder, f"{path}: include_prompt false")
    return _POOLING[modes[0]]


def _dense(folder: Path, path: str, own: Mapping[str, Any]) -> Stage:
    for name in ("module_input_name", "module_output_name"):
        if own.get(name, _POOLED) not in (_POOLED, None):
            raise _refused(folder, f"{path}: {name} {own[name]!r}")
    named = str(own.get("activation_function") or "torch.nn.modules.activation.Tanh")
    activation = _ACTIVATIONS.get(named.rpartition(".")[2])
    if activation is None or not named.startswith("torch."):
        raise _refused(folder, f"{path}: activation_function {named}")
    if own.get("use_residual") and own.get("in_features") != own.get("out_features"):
        raise _refused(folder, f"{path}: use_residual with a projection")
    return Stage(
        weight="linear.weight",
        bias="linear.bias" if own.get("bias", True) else None,
        file=_weights(folder, path),
        activation=activation,
        residual=bool(own.get("use_residual")),
    )


def _weights(folder: Path, path: str) -> str:
    name = f"{path}/model.safetensors"
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name} is missing; pickles (pytorch_model.bin) are not read: save it anew")
    return name


def _prompts(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    try:
        return msgspec.convert(settings.get("prompts") or {}, dict[str, str])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{folder}/config_sentence_transformers.json: prompts: {error}") from error


def _refused(folder: Path, what: str) -> Unsupported:
    return Unsupported(f"{folder.name}/{MODULES}", [f"{what} is not understood"])
