"""Finds a model's folder or GGUF file: a path, the embedded model, or a repository of the Hugging Face hub and its
cache.

The hub's own library reads HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from anychip.config import EngineConfig
from anychip.errors import CheckpointError, ConfigError
from anychip.gguf.model import is_gguf, only_model_in, piece_names, pieces_of
from anychip.types import QUICKSTART
from anychip.weight_files import weight_files

_QUICKSTART_FOLDER = Path(__file__).parent / "quickstart"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""What can be a repository of the hub."""

_FILE_OF_REPOSITORY = re.compile(rf"({_REPOSITORY.pattern}):([\w./-]+\.gguf)")
"""org/model:file.gguf."""

_FROM_MODELS = ("draft", "eagle", "medusa")
"""Kinds of proposers that are read from a folder: --speculate KIND:MODEL."""

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.py", "*.txt")
"""What a checkpoint is made of; pickles are left where they are."""
_NOT = ("*/*.safetensors", "consolidated*.safetensors")
"""The same weights in another format, which some repositories hold beside the model."""


def located(config: EngineConfig) -> EngineConfig:
    """The configuration with folders in place of names, found once and for every process."""
    model = str(resolve_folder(config.model, config.revision)) if config.model != QUICKSTART else config.model
    tokenizer = str(resolve_folder(config.tokenizer)) if config.tokenizer is not None else None
    return msgspec.structs.replace(
        config,
        model=model,
        tokenizer=tokenizer,
        speculate=_located_source(config.speculate),
        served_model_name=config.public_name,
    )


def _located_source(speculate: str | None) -> str | None:
    """--speculate with the folder of the model that it names, where it names one."""
    kind, _, source = (speculate or "").partition(":")
    if kind not in _FROM_MODELS or source in ("", QUICKSTART):
        return speculate
    return f"{kind}:{resolve_folder(source)}"


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model's files, downloaded first where it is a repository that the cache does not hold; or, of a
    GGUF model, its file or its first piece.

    Raises ConfigError where there is none.
    """
    if model == QUICKSTART:
        return _QUICKSTART_FOLDER
    folder = Path(model).expanduser()
    if folder.is_dir():
        return only_model_in(folder) or folder
    if is_gguf(folder) and folder.is_file():
        return pieces_of(folder)[0]
    if named := _FILE_OF_REPOSITORY.fullmatch(model):
        return _file_from_hub(named[1], named[2], revision)
    if not _REPOSITORY.fullmatch(model):
        raise ConfigError(
            f"model {model!r} is not a folder; give the path of a Hugging Face checkpoint, the name of a repository "
            f"such as org/model, a GGUF file (its path, or org/model:file.gguf), or {QUICKSTART!r} for the embedded one"
        )
    return _from_hub(model, revision)


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        cached = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        if _complete(cached):
            return cached
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(_FILES), ignore_patterns=list(_NOT))
        )
        if not _complete(folder):  # offline, what is there is returned
            raise FileNotFoundError(f"{folder} lacks config.json or weights")
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"model {repository!r}{at} is neither a folder nor complete in the hub's cache, and could not be "
            f"downloaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _file_from_hub(repository: str, file: str, revision: str | None) -> Path:
    """A GGUF file of a repository, with all of its pieces."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    folder, _, name = file.rpartition("/")
    names = [f"{folder}/{piece}" if folder else piece for piece in piece_names(name)]
    try:
        found = [Path(hf_hub_download(repository, each, revision=revision)) for each in names]
        return found[0]
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ConfigError(
            f"file {file!r} of {repository!r} is not in the hub's cache, and could not be downloaded: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _complete(folder: Path) -> bool:
    """Whether an interrupted download left nothing out that a start would miss."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except CheckpointError:
        return False
