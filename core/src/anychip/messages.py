"""What crosses process boundaries: msgspec structs without tensors, encoded as MessagePack.

API process -> engine: AddRequest, Abort, Shutdown.      Engine -> API: EngineReady, Outputs, Heartbeat, EngineFailed.
Engine -> workers: StepDecision, LateInputs, Shutdown.   Workers -> engine: WorkerProgress, WorkerReady, StepResult,
                                                                            WorkerFailed.
Both ways down: LoadAdapter, DropAdapter. Both ways up: AdapterReport. step_messages.py has those of a step,
worker_report.py what workers say when they are ready, and engine_stats.py how the engine stands.
"""

from __future__ import annotations

import msgspec

from anychip.engine_stats import EngineStats
from anychip.errors import Fault
from anychip.prefix import MediaSpan
from anychip.prompt_extras import PromptExtras
from anychip.sampling_params import SamplingParams
from anychip.step_messages import LateInputs, StepDecision, StepResult, TokenLogprobs
from anychip.types import FinishReason
from anychip.worker_report import WorkerReady


class AddRequest(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One request, already tokenized and checked. `sampling.n` sequences come of it, indexed from 0."""

    request_id: str
    prompt: bytes
    """The prompt's ids: int32 [num_prompt]."""
    sampling: SamplingParams
    max_output: int
    stop_ids: tuple[int, ...]
    priority: int = 0
    cache_salt: str = ""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """The words that may not be completed, as tokens."""
    structured_after: tuple[int, ...] = ()
    """Tokens after which structured output begins; (): at once."""
    tenant: str = ""
    """Who sent the request, for policies that share the device fairly."""
    deadline: float | None = None
    """Seconds from its arrival at the engine after which it ends with an error."""
    block_hashes: bytes = b""
    """The hashes of the prompt's full KV blocks, one after the other (kv_cache/hashing); b"": the engine makes them."""
    weights_version: int = 0
    """The one that `block_hashes` were made for. Where the engine has another, it makes them again."""
    adapter: bytes | None = None
    """Digest of the adapter that the request runs with; None: without any."""
    media: tuple[MediaSpan, ...] = ()
    """The prompt's tokens that stand for media, in order."""
    whole: bool = False
    """Nobody reads its tokens as they come: each sequence is told of once, when it ends, with all of them. Not for
    requests with log-probabilities, stop strings or beams."""
    extras: PromptExtras | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.prompt) // 4

    @property
    def prompt_token_ids(self) -> memoryview:
        """The same ids as integers; nothing is copied."""
        return memoryview(self.prompt).cast("i")


class Abort(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Ends requests; `index` ends one sequence of a request only. `reason` is "stop" where a stop string was found:
    the sequence is complete."""

    request_id: str
    index: int | None = None
    reason: FinishReason = "abort"


class LoadAdapter(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An adapter's folder is to be read and kept on the host, beside steps; AdapterReport says when it is done. One
    that is there already is reported at once."""

    digest: bytes
    folder: str


class DropAdapter(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """No request will have the adapter any more; those that have it end first."""

    digest: bytes


class AdapterReport(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An adapter is loaded, on one rank or on all; or `error`, class name and message, says why it is not."""

    digest: bytes
    error: tuple[str, str] | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


class SequenceDelta(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one sequence, and its end."""

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities of the prompt's tokens from the second on; they come with the first new token."""
    cached_tokens: int = 0
    queued_s: float | None = None
    """With the first token: how long the request waited until it was first scheduled."""
    error: tuple[str, str] | None = None
    """Class name and message of what refused the request."""
    vector: bytes | None = None
    """float32 [hidden_size], of a request with PromptExtras.pooling, which it ends."""


class Outputs(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sent after each step that brought anything."""

    deltas: list[SequenceDelta]
    stats: EngineStats | None = None


class Heartbeat(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sent every half second by a thread of the engine process, however long its loop is busy."""

    doing: str
    """What the engine is doing, in words for people."""
    busy_s: float
    """Seconds since its last progress; time in which the process was stopped does not count."""
    limit_s: float
    """Seconds that may pass until its next progress."""
    worker_pids: tuple[int, ...] = ()
    stats: EngineStats | None = None
    """None while it starts."""


class WorkerProgress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Sent while a worker starts."""

    rank: int
    doing: str


class WorkerFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`error` is a class name. With a `step_id`, the worker goes on without that step; otherwise it ends."""

    rank: int
    error: str
    message: str
    fault: Fault | None = None
    step_id: int | None = None


class EngineReady(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`max_model_len` is what was asked for, or the longest that model and KV cache hold. `hash_block_size`: tokens
    under one hash of the prefix cache; None: there is none."""

    worker: WorkerReady
    max_model_len: int
    hash_block_size: int | None = None


class EngineFailed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The engine's last words; `error` is a class name."""

    error: str
    message: str
    fault: Fault | None = None


ToEngine = AddRequest | Abort | LoadAdapter | DropAdapter | Shutdown
FromEngine = EngineReady | Outputs | Heartbeat | AdapterReport | EngineFailed
ToWorker = StepDecision | LateInputs | LoadAdapter | DropAdapter | Shutdown
FromWorker = WorkerProgress | WorkerReady | StepResult | AdapterReport | WorkerFailed
