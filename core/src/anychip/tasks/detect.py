"""Finds a checkpoint's task in its files, or takes the operator's word; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import msgspec

from anychip.config import EngineConfig
from anychip.errors import ConfigError, Unsupported
from anychip.family_defaults import ENCODERS, is_encoder
from anychip.model_config import ModelConfig
from anychip.tasks.classifiers import activation_of, head_of, labels_of
from anychip.tasks.sentence_transformers import MODULES, Described, described, read_object
from anychip.tasks.served import ROUTES, ServedTask, Stage, Task

_CLASSIFIES = "ForSequenceClassification"


def served_task(config: EngineConfig, model: ModelConfig) -> ServedTask:
    """Raises ConfigError or Unsupported for a task that the checkpoint does not have, and for files that are not
    understood."""
    asked, folder, architecture = config.task, Path(model.folder), model.architecture
    has_modules = (folder / MODULES).is_file()
    if asked == "generate" or (asked == "auto" and not has_modules and _generates(architecture)):
        if is_encoder(architecture):
            raise ConfigError(f"{architecture} is an encoder and draws no text; leave out --task generate")
        why = "--task generate" if asked == "generate" else f"architecture {architecture}"
        return ServedTask(task="generate", why=why)
    _check_attention(model)
    files = described(folder) if has_modules else None
    if architecture.endswith(_CLASSIFIES) and asked != "embed":
        return _classifier(config, model, files)
    if asked == "score" or (asked == "auto" and files is not None and files.answers):
        return _answering(config, model, files)
    if asked not in ("auto", "embed"):
        raise ConfigError(
            f"--task {asked} takes a classifier, and the checkpoint's architecture is {architecture}; "
            f"...{_CLASSIFIES} would be one"
        )
    return _embedder(config, model, files)


def resolved(config: EngineConfig, model: ModelConfig, served: ServedTask) -> EngineConfig:
    """The configuration with what the task asks for in place of what nobody set."""
    if served.draws:
        for name in ("vector_pooling", "vector_dimensions"):
            if getattr(config, name):
                raise ConfigError(f"{name} is for vectors, and this serves text; give task embed, or leave it out")
        return msgspec.structs.replace(config, task="generate")
    if config.speculate is not None:
        raise ConfigError(f"--speculate drafts text, and the checkpoint serves {served.task} ({served.why})")
    length = config.max_model_len or min(model.max_positions, served.max_length or model.max_positions)
    tokens = config.max_num_batched_tokens
    if is_encoder(model.architecture):
        if tokens is not None and tokens < length:
            raise ConfigError(
                f"an encoder computes a text in one step: max_num_batched_tokens is {tokens}, and a text may have "
                f"{length}; raise it, or lower --max-model-len"
            )
        tokens = max(config.resolved_max_num_batched_tokens, length)
    return msgspec.structs.replace(
        config, task=served.task, pooling=True, max_model_len=max(2, length), max_num_batched_tokens=tokens
    )


def _generates(architecture: str) -> bool:
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):  # GPT-2 and others of its age are called so
        return True
    return not architecture.endswith((_CLASSIFIES, "Model")) and not architecture.startswith(ENCODERS)


def _check_attention(model: ModelConfig) -> None:
    both = model.get("use_bidirectional_attention") or model.get("is_causal") is False
    if both and not is_encoder(model.architecture):
        raise Unsupported(model.architecture, ["a decoder whose tokens see those behind them is not served"])
    if model.architecture.startswith(ENCODERS) and not is_encoder(model.architecture):
        raise Unsupported(
            model.architecture, [f"no task of it is served; of this family ...Model and ...{_CLASSIFIES} are"]
        )


def _embedder(config: EngineConfig, model: ModelConfig, files: Described | None) -> ServedTask:
    if files is not None and files.kind != "SentenceTransformer":
        raise ConfigError(
            f"{MODULES} describes a {files.kind}, and the architecture {model.architecture} no classifier"
        )
    pooling = config.vector_pooling or (None if files is None else files.pooling)
    if pooling is None:
        raise ConfigError(
            f"{model.folder} has no {MODULES}, and {model.architecture} does not say how a vector is made of its "
            "tokens' hidden states; give --task embed --vector-pooling cls, mean or last, as its authors say"
        )
    size = model.hidden_size if files is None or files.size is None else files.size
    trained = model.get("matryoshka_dimensions") or ()
    return ServedTask(
        task="embed",
        why=f"--vector-pooling {pooling}" if files is None else MODULES,
        pooling=pooling,
        stages=() if files is None else files.stages,
        normalize=True if files is None else files.normalize,
        size=size,
        dimensions=config.vector_dimensions or tuple(int(each) for each in trained),
        any_dimension=bool(model.get("is_matryoshka", False)) and not config.vector_dimensions,
        prompts={} if files is None else files.prompts,
        default_prompt=None if files is None else files.default_prompt,
        similarity="cosine" if files is None else files.similarity,
        lower_case=files is not None and files.lower_case,
        max_length=_max_length(model, files),
    )


def _classifier(config: EngineConfig, model: ModelConfig, files: Described | None) -> ServedTask:
    head, labels = head_of(model), labels_of(model)
    encoder = is_encoder(model.architecture)
    task: Task = "score" if encoder and len(labels) == 1 else "classify"
    if config.task != "auto":
        task = config.task
    if task in ("score", "reward") and len(labels) != 1:
        raise ConfigError(f"--task {task} takes a classifier of one label, and the checkpoint has {len(labels)}")
    if task == "score" and not encoder:
        raise ConfigError(f"{model.architecture} does not say how a pair becomes a prompt; --task classify or reward")
    named = None if files is None else files.activation
    return ServedTask(
        task=task,
        why=f"architecture {model.architecture} with {len(labels)} label{'s' if len(labels) > 1 else ''}",
        pooling=head.pooling,
        stages=head.stages,
        size=len(labels),
        labels=labels,
        activation="identity" if task == "reward" else activation_of(model, named),
        prompts={} if files is None else files.prompts,
        default_prompt=None if files is None else files.default_prompt,
        lower_case=files is not None and files.lower_case,
        max_length=_max_length(model, files),
    )


def _answering(config: EngineConfig, model: ModelConfig, files: Described | None) -> ServedTask:
    """A decoder whose score is how much likelier it says yes than no."""
    if not model.architecture.endswith("ForCausalLM"):
        raise ConfigError(
            f"--task score takes a cross-encoder or a decoder with an output head, not a {model.architecture}"
        )
    if changed := [name for name in _CHANGES_LOGITS if model.get(name) not in (None, 1, 1.0)]:
        raise Unsupported(model.architecture, [f"scores of a model whose logits {changed[0]} changes"])
    rows = files.answers if files is not None and files.answers else _yes_and_no(Path(model.folder))
    tied = bool(model.tie_word_embeddings)
    head = Stage(weight="model.embed_tokens.weight" if tied else "lm_head.weight", rows=rows)
    return ServedTask(
        task="score",
        why=f"{MODULES} with LogitScore" if files is not None and files.answers else "--task score, by yes and no",
        pooling="last",
        stages=(head,),
        size=1,
        labels=("LABEL_0",),
        activation=activation_of(model, "torch.Sigmoid" if files is None else files.activation or "torch.Sigmoid"),
        prompts={} if files is None else files.prompts,
        default_prompt=None if files is None else files.default_prompt,
        lower_case=files is not None and files.lower_case,
        in_template=files is None or files.in_template,
        max_length=_max_length(model, files),
    )


_CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "lm_head_multiplier")


def _yes_and_no(folder: Path) -> tuple[int, ...]:
    """sentence-transformers' tokens of a decoder whose files name none. Raises Unsupported."""
    vocabulary = read_object(folder / "tokenizer.json").get("model", {}).get("vocab", {})
    known = vocabulary if isinstance(vocabulary, dict) else {}
    if not {"yes", "no"} <= known.keys():
        raise Unsupported(
            folder.name,
            [
                "scores of a decoder whose tokenizer.json has no tokens yes and no; leave --task score out, or serve a "
                "checkpoint that was trained to rank"
            ],
        )
    return int(known["yes"]), int(known["no"])


def _max_length(model: ModelConfig, files: Described | None) -> int | None:
    """What sentence-transformers' settings say, or else the tokenizer's."""
    if files is not None and files.max_length is not None:
        return int(files.max_length)
    said = read_object(Path(model.folder) / "tokenizer_config.json").get("model_max_length")
    return int(said) if isinstance(said, int) and said < model.max_positions else None


def refusal(served: ServedTask, asked: str) -> str:
    """Why a request for another task is refused, and what would be served."""
    return (
        f"this server's task is {served.task} ({served.why}), and the request asks for {asked}; "
        f"{served.task} is served at {ROUTES[served.task]}"
    )
