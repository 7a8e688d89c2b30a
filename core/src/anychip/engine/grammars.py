"""Requests that wait for their grammars to be compiled, beside the loop that runs the others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from anychip.errors import AnychipError, InvalidRequest
from anychip.messages import AddRequest
from anychip.request import LogitsProcessor
from anychip.sampling_params import StructuredOutput
from anychip.structured_output.processor import GrammarCompiler, GrammarProcessor

_WAIT_S = 0.02
"""How long an idle loop waits at a time: it also has messages to read."""

Compiled = tuple[AddRequest, Sequence[LogitsProcessor], AnychipError | None]


class PendingGrammars:
    """Sized by the requests that wait."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._pending: dict[str, tuple[AddRequest, Future[list[GrammarProcessor]]]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    def submit(self, message: AddRequest, wanted: StructuredOutput) -> None:
        num_prompt, count = len(message.prompt_token_ids), message.sampling.num_sequences
        after = message.structured_after
        future = self._compiler.submit(wanted, num_prompt=num_prompt, count=count, after=after)
        self._pending[message.request_id] = (message, future)

    def cancel(self, request_id: str) -> bool:
        """Whether the request was still waiting."""
        found = self._pending.pop(request_id, None)
        if found is not None:
            found[1].cancel()
        return found is not None

    def ready(self, *, wait: bool) -> list[Compiled]:
        """Requests that may start, each with a grammar for every sequence, or with what is wrong."""
        if wait:
            self._wait()
        done = [request_id for request_id, (_, future) in self._pending.items() if future.done()]
        return [self._outcome(*self._pending.pop(request_id)) for request_id in done]

    def close(self) -> None:
        self._compiler.close()

    def _wait(self) -> None:
        wait([future for _, future in self._pending.values()], _WAIT_S, FIRST_COMPLETED)

    @staticmethod
    def _outcome(message: AddRequest, future: Future[list[GrammarProcessor]]) -> Compiled:
        error = future.exception()
        if error is None:
            return message, future.result(), None
        return message, (), error if isinstance(error, AnychipError) else InvalidRequest(f"the grammar failed: {error}")
