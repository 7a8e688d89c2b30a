"""The adapters that an engine has: being read, ready, or leaving once the requests that have them have ended."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from anychip.errors import UnknownModel
from anychip.executor.protocol import Executor
from anychip.messages import AdapterReport, DropAdapter, LoadAdapter
from anychip.scheduler.protocol import StepScheduler


class AdapterState(enum.Enum):
    LOADING = enum.auto()
    READY = enum.auto()
    LEAVING = enum.auto()
    """No request may begin with it; those that have it go on."""


class EngineAdapters:
    """Adapters go by their digests. A load is read by the workers beside the steps."""

    def __init__(self, executor: Executor, scheduler: StepScheduler) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._states: dict[bytes, AdapterState] = {}
        self._loading = self._leaving = 0  # how many of them are in these states

    @property
    def digests(self) -> Iterable[bytes]:
        """Of the adapters that requests may have."""
        return [digest for digest, state in self._states.items() if state is AdapterState.READY]

    @property
    def is_settled(self) -> bool:
        """Whether none is being read, and none leaves."""
        return not self._leaving and not self._loading

    def load(self, message: LoadAdapter) -> None:
        """Asks the workers for an adapter; `poll` reports it. One that was leaving stays."""
        before = self._states.get(message.digest)
        self._leaving -= before is AdapterState.LEAVING
        self._loading += before is not AdapterState.LOADING
        self._states[message.digest] = AdapterState.LOADING
        self._executor.load_adapter(message)

    def drop(self, message: DropAdapter) -> None:
        """No request begins with the adapter any more; it leaves when the last one that has it has ended."""
        if self._states.get(message.digest) is AdapterState.READY:
            self._states[message.digest] = AdapterState.LEAVING
            self._leaving += 1

    def poll(self) -> list[AdapterReport]:
        """What became of loads since the last call."""
        reports = self._executor.adapter_reports() if self._loading else []
        for report in reports:
            if self._states.get(report.digest) is AdapterState.LOADING:
                self._loading -= 1
                if report.error is None:
                    self._states[report.digest] = AdapterState.READY
                else:
                    del self._states[report.digest]
        return reports

    def check(self, digest: bytes) -> None:
        """Raises UnknownModel for an adapter that is not here, or leaves."""
        if self._states.get(digest) is not AdapterState.READY:
            raise UnknownModel("the adapter that the request asks for is not loaded; load it, or leave it out")

    def let_go(self, pending: Iterable[bytes | None] = ()) -> None:
        """Drops those that leave and that no request has; `pending` are the adapters of requests that have not entered
        the scheduler."""
        if not self._leaving:
            return
        used = {request.adapter for request in self._scheduler.all_sequences()} | set(pending)
        for digest in [d for d, state in self._states.items() if state is AdapterState.LEAVING and d not in used]:
            del self._states[digest]
            self._leaving -= 1
            self._scheduler.adapters.forget(digest)
            self._executor.drop_adapter(DropAdapter(digest))
