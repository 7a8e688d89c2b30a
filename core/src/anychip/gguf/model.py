"""A GGUF model: one file, or the pieces name-00001-of-0000n.gguf."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from anychip.errors import CheckpointError, ConfigError
from anychip.gguf.header import StoredTensor, read_header
from anychip.gguf.metadata import Metadata

SUFFIX = ".gguf"
_PIECE = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """`paths` are the pieces in their order, `tensors` those of all of them."""

    paths: tuple[Path, ...]
    metadata: Metadata
    tensors: dict[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    return path.suffix == SUFFIX


def read_model(path: Path) -> GGUFModel:
    """`path` is the file, or any of its pieces. Raises CheckpointError for a piece that is missing or is not one of
    the same model, and for what read_header refuses."""
    paths = pieces_of(path)
    headers = [read_header(each) for each in paths]
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{tensors[name].path} and {header.path.name} both hold tensor {name!r}")
            tensors[name] = tensor
    first = Metadata(paths[0], headers[0].metadata)
    expected, count = first.integer("split.tensors.count"), first.integer("split.count")
    if count not in (None, 0, len(paths)):
        raise CheckpointError(
            f"{paths[0]} says that it is a piece of {count}, and its name says {len(paths)}; a piece is named "
            f"name-00001-of-{count:05d}{SUFFIX}"
        )
    if expected is not None and expected != len(tensors):
        raise CheckpointError(
            f"{paths[0]} announces {expected} tensors in {len(paths)} pieces, and they hold {len(tensors)}; "
            "download the model again"
        )
    return GGUFModel(tuple(paths), first, tensors)


def piece_names(name: str) -> list[str]:
    """The names of all pieces, of the name of one; of a name that is no piece's, itself."""
    match = _PIECE.fullmatch(name)
    if match is None:
        return [name]
    count = int(match[3])
    return [f"{match[1]}-{number:05d}-of-{match[3]}{SUFFIX}" for number in range(1, count + 1)]


def pieces_of(path: Path) -> list[Path]:
    """Raises CheckpointError for a piece that is not there."""
    paths = [path.with_name(name) for name in piece_names(path.name)]
    for piece in paths:
        if not piece.is_file():
            raise CheckpointError(f"{piece} is missing: {path.name} is one of {len(paths)} pieces; download it too")
    return paths


def only_model_in(folder: Path) -> Path | None:
    """The GGUF model of a folder that has one and no other checkpoint: its file or its first piece. None where the
    folder holds no GGUF file, or is a checkpoint of another kind. Raises ConfigError where there are several."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files or any(folder.glob("*.safetensors")):
        return None
    first = {path.with_name(piece_names(path.name)[0]) for path in files}
    if len(first) > 1:
        raise ConfigError(
            f"{folder} holds {len(first)} GGUF models; name one of them: {', '.join(sorted(p.name for p in first))}"
        )
    return first.pop()
