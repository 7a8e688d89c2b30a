"""What a checkpoint serves: text, vectors, labels or scores, and how they are made of hidden states. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from anychip.prompt_extras import PoolingKind

Task = Literal["generate", "embed", "classify", "score", "reward"]
TASKS: tuple[str, ...] = get_args(Task)

StageActivation = Literal["identity", "tanh", "relu", "gelu", "silu", "sigmoid"]
LabelActivation = Literal["identity", "sigmoid", "softmax"]

ROUTES: Mapping[str, str] = {
    "generate": "/v1/chat/completions and /v1/completions",
    "embed": "/v1/embeddings, /embed and /pooling",
    "classify": "/classify, /predict and /pooling",
    "score": "/rerank, /score, /classify and /pooling",
    "reward": "/pooling and /classify",
}
"""By task: where it is asked for."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One step from a pooled vector to what is served: act(weight @ x + bias), or a layer norm."""

    weight: str
    """The tensor's name."""
    bias: str | None = None
    file: str = ""
    """Beside the checkpoint's own files; "": among them."""
    activation: StageActivation = "identity"
    norm_eps: float | None = None
    """Not None: the stage is a layer norm."""
    residual: bool = False
    """Whether the input is added to the output."""
    rows: tuple[int, ...] = ()
    """Rows of the weight that count: one, or one less another; (): all."""


class ServedTask(msgspec.Struct, frozen=True, kw_only=True):
    """`why` is what told so, in words for people."""

    task: Task
    why: str
    pooling: PoolingKind = "last"
    stages: tuple[Stage, ...] = ()
    normalize: bool = False
    size: int = 0
    """Numbers of a vector, or of labels."""
    dimensions: tuple[int, ...] = ()
    """Sizes to which a vector may be cut, as the checkpoint was trained for it."""
    any_dimension: bool = False
    """Whether it may be cut to every size."""
    prompts: dict[str, str] = {}
    """What is put before a text, by name."""
    default_prompt: str | None = None
    similarity: str = "cosine"
    lower_case: bool = False
    labels: tuple[str, ...] = ()
    activation: LabelActivation = "identity"
    """Of a classifier's logits, where the request asks for no other."""
    in_template: bool = False
    """Whether the chat template makes a prompt of a pair, whose texts have the roles query and document."""
    max_length: int | None = None
    """Tokens of a text that the checkpoint's files allow; None: as many as the model has positions."""

    @property
    def draws(self) -> bool:
        """Whether requests are answered with text."""
        return self.task == "generate"
