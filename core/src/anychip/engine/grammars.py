"""Requests that wait for their grammars to be compiled, beside the loop that runs the others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

from anychip.errors import AnychipError, InvalidRequest
from anychip.messages import AddRequest
from anychip.request import LogitsProcessor
from anychip.sampling_params import StructuredOutput
from anychip.structured_output.processor import GrammarCompiler, GrammarProcessor

_WAIT_S = 0.02
"""How long an idle loop waits at a time: it also has messages to read."""


class _Pending(NamedTuple):
    message: AddRequest
    arrived_at: float
    future: Future[list[GrammarProcessor]]


class Compiled(NamedTuple):
    """A request that may start, with a grammar for every sequence, or with what is wrong."""

    message: AddRequest
    arrived_at: float
    grammars: Sequence[LogitsProcessor]
    error: AnychipError | None


class PendingGrammars:
    """Sized by the requests that wait."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._pending: dict[str, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    @property
    def waiting(self) -> list[tuple[AddRequest, float]]:
        """The requests that wait, and when they arrived."""
        return [(pending.message, pending.arrived_at) for pending in self._pending.values()]

    def submit(self, message: AddRequest, wanted: StructuredOutput, arrived_at: float) -> None:
        count, after = message.sampling.num_sequences, message.structured_after
        future = self._compiler.submit(wanted, count=count, after=after)
        self._pending[message.request_id] = _Pending(message, arrived_at, future)

    def cancel(self, request_id: str) -> bool:
        """Whether the request was still waiting."""
        found = self._pending.pop(request_id, None)
        if found is not None:
            found.future.cancel()
        return found is not None

    def ready(self, *, wait: bool) -> list[Compiled]:
        """Requests that wait no more."""
        if wait:
            self._wait()
        done = [request_id for request_id, pending in self._pending.items() if pending.future.done()]
        return [self._outcome(self._pending.pop(request_id)) for request_id in done]

    def close(self) -> None:
        self._compiler.close()

    def _wait(self) -> None:
        wait([pending.future for pending in self._pending.values()], _WAIT_S, FIRST_COMPLETED)

    @staticmethod
    def _outcome(pending: _Pending) -> Compiled:
        message, arrived_at, future = pending
        error = future.exception()
        if error is None:
            return Compiled(message, arrived_at, future.result(), None)
        known = error if isinstance(error, AnychipError) else InvalidRequest(f"the grammar failed: {error}")
        return Compiled(message, arrived_at, (), known)
