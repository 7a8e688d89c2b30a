"""A folder for a checkpoint that is made here: there whole or not at all, with what stands beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from anychip.errors import ConfigError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@contextmanager
def new_checkpoint(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end and goes where that is not reached. Raises ConfigError for a
    target that is there already and is no empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already, and is no empty folder; give another --output")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_beside_weights(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Configuration, tokenizer and whatever else a folder holds, but for weights, the files `but`, and what is in
    `target` already."""
    for path in source.iterdir():
        if (
            path.is_file()
            and path.suffix not in _WEIGHTS
            and path.name not in but
            and not (target / path.name).exists()
        ):
            shutil.copyfile(path, target / path.name)
