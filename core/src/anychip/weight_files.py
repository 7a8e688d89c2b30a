"""Which files of a folder are a checkpoint's weights, and which tensors of each count. Reads names, no tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from anychip.errors import CheckpointError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PIECE = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """`tensors` are those that the index assigns to the file; None: all that it holds."""

    path: Path
    tensors: frozenset[str] | None = None


def weight_files(folder: Path) -> list[WeightFile]:
    """model.safetensors where the folder has it; else the files of its index; else, without either, the pieces
    model-00001-of-0000n.safetensors, or the only model*.safetensors. Any other file belongs to something else: an
    adapter, an optimizer, another format of the same weights.

    Raises CheckpointError where that is not a whole checkpoint.
    """
    if (folder / WHOLE).is_file():
        return [WeightFile(folder / WHOLE)]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    files = sorted(folder.glob("model*.safetensors"))
    pieces = [match for path in files if (match := _PIECE.fullmatch(path.name))]
    if pieces and len(pieces) == len(files):
        return _pieces(folder, pieces)
    if len(files) == 1:
        return [WeightFile(files[0])]
    raise CheckpointError(_why_none(folder, files))


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _indexed(folder: Path) -> list[WeightFile]:
    index = folder / INDEX
    try:
        assigned = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{index} is no index of a checkpoint: {error}") from error
    if not assigned:
        raise CheckpointError(f"{index} assigns no tensor to any file; download the checkpoint again")
    tensors: dict[str, set[str]] = {}
    for tensor, name in assigned.items():
        tensors.setdefault(name, set()).add(tensor)
    for name in sorted(tensors):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{index} names {name}, which is not in {folder} ({len(tensors[name])} tensors are to be in it); "
                "download the file again"
            )
    return [WeightFile(folder / name, frozenset(tensors[name])) for name in sorted(tensors)]


def _pieces(folder: Path, pieces: list[re.Match[str]]) -> list[WeightFile]:
    counts = {int(piece[2]) for piece in pieces}
    missing = set(range(1, max(counts) + 1)) - {int(piece[1]) for piece in pieces}
    if len(counts) > 1 or missing:
        what = f"piece {min(missing)}" if missing else "one series"
        raise CheckpointError(
            f"{folder} holds {', '.join(piece[0] for piece in pieces)}, and not {what} of {max(counts)}; "
            "download the checkpoint again"
        )
    return [WeightFile(folder / piece[0]) for piece in pieces]


def _why_none(folder: Path, files: list[Path]) -> str:
    if files:
        names = ", ".join(path.name for path in files)
        return f"{folder} holds {names}, and nothing says which to read; name one of them {WHOLE}, or add {INDEX}"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds {pickles[0]}, a pickle, which can run code when it is read; anychip reads "
            "safetensors only: convert it with save_pretrained(..., safe_serialization=True)"
        )
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    if others:
        return (
            f"{folder} holds {others[0]}, and no {WHOLE}: that is another format, an adapter, or the model of another "
            f"folder; give the folder of the model itself, or save it as {WHOLE}"
        )
    return f"{folder} holds no *.safetensors file; --load-format dummy runs without weights"
