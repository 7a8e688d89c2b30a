"""What the engine asks of whoever decides its steps: one scheduler, or one for each data-parallel lane."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from anychip.engine_stats import EngineStats
from anychip.kv_cache.manager import KVCacheManager
from anychip.messages import SequenceDelta
from anychip.request import Request
from anychip.scheduler.drafting import Drafting
from anychip.step_messages import AnyDecision, ExpertStats
from anychip.types import FinishReason, RequestId


class LaunchedStep(Protocol):
    """A step as it leaves a scheduler."""

    @property
    def decision(self) -> AnyDecision: ...
    @property
    def requests(self) -> Iterable[Request]: ...
    @property
    def restricted(self) -> bool:
        """Whether anything restricts a token that it draws."""
        ...

    @property
    def drafted(self) -> object | None:
        """What is drafted in it; None: nothing."""
        ...

    @property
    def proposing(self) -> Sequence[object]:
        """What the workers draft behind it."""
        ...


class AllWaiting(Protocol):
    """The requests that wait."""

    @property
    def num_tokens(self) -> int:
        """Of their prompts."""
        ...

    def __len__(self) -> int: ...


class AdapterHolder(Protocol):
    def forget(self, adapter: bytes) -> None:
        """The adapter is gone, and nobody holds it."""
        ...


class StepScheduler(Protocol):
    """scheduler.Scheduler says what each of these does."""

    experts: ExpertStats | None
    max_tokens: int
    max_rows: int
    """Limits of one step, of one lane."""

    @property
    def kv(self) -> KVCacheManager:
        """For what is the same in all lanes: groups, hashes, the weights' version."""
        ...

    @property
    def drafting(self) -> Drafting | None: ...
    @property
    def adapters(self) -> AdapterHolder: ...
    @property
    def waiting(self) -> AllWaiting: ...
    @property
    def running(self) -> list[Request]: ...
    @property
    def requests(self) -> Mapping[RequestId, Mapping[int, Request]]: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def stats(self) -> EngineStats: ...

    def add(self, *sequences: Request) -> None: ...
    def sequences(self, request_id: RequestId) -> list[Request]: ...
    def all_sequences(self) -> Iterator[Request]: ...
    def abort(self, request_id: RequestId, index: int, reason: FinishReason = "abort") -> bool: ...
    def weights_changed(self) -> None: ...
    def schedule(self) -> LaunchedStep | None: ...
    def update(self, step: Any, result: Any) -> list[SequenceDelta]:
        """`step` is one of its own, `result` what came of its decision."""
        ...

    def abandon(self, step: Any) -> set[RequestId]: ...
