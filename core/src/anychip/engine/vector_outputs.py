"""What becomes of a vector on its way to the caller: cut to fewer dimensions, or read as labels and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anychip.errors import InvalidRequest
from anychip.tasks.served import LabelActivation, ServedTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """A text's labels: `scores` by label, after the activation."""

    label: str
    scores: np.ndarray  # [num_labels] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A document of a rerank, by its index in the request."""

    index: int
    score: float


def check_dimensions(served: ServedTask, asked: int | None) -> None:
    """Raises InvalidRequest for a size that the model does not offer."""
    if asked is None or asked == served.size:
        return
    if asked in served.dimensions or (served.any_dimension and 1 <= asked <= served.size):
        return
    if served.any_dimension:
        offered = f"1 to {served.size}"
    else:
        offered = ", ".join(map(str, sorted({*served.dimensions, served.size})))
    raise InvalidRequest(f"dimensions is {asked}; the model's vectors have {offered}", param="dimensions")


def cut(vector: np.ndarray, dimensions: int | None, *, normalize: bool) -> np.ndarray:
    """The first `dimensions` numbers, of length 1 where the whole vector was."""
    if dimensions is None or dimensions >= len(vector):
        return vector
    vector = vector[:dimensions]
    return vector / max(float(np.linalg.norm(vector)), 1e-12) if normalize else vector


def activated(logits: np.ndarray, activation: LabelActivation) -> np.ndarray:
    """[num_labels] float32."""
    if activation == "identity":
        return logits
    wide = logits.astype(np.float64)
    if activation == "sigmoid":
        found = 1.0 / (1.0 + np.exp(-np.clip(wide, -500, 500)))
    else:
        powers = np.exp(wide - wide.max())
        found = powers / powers.sum()
    return np.asarray(found, dtype=np.float32)


def classified(served: ServedTask, logits: np.ndarray, *, raw: bool = False) -> Classified:
    """`raw`: logits as they are."""
    scores = logits if raw else activated(logits, served.activation)
    return Classified(label=served.labels[int(logits.argmax())], scores=scores)


def ranked(scores: Sequence[float], top_n: int | None) -> list[Ranked]:
    """Best first; equal scores in the order of the documents."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [Ranked(index=index, score=scores[index]) for index in order[:top_n]]
