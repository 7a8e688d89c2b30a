"""The engine in its callers' own process: several of them share it, each receiving what is its own."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

import msgspec

from anychip.engine.engine_core import EngineCore
from anychip.engine.output_processor import OutputProcessor, receive
from anychip.engine.outputs import RequestOutput
from anychip.errors import AnychipError, EngineDead, RequestAborted
from anychip.messages import Abort, AddRequest, SequenceDelta

log = logging.getLogger("anychip.engine")

T = TypeVar("T")

_Mailbox = deque[RequestOutput | Exception]
"""What a run has not yielded yet, in the order in which it came."""


class SharedEngine:
    """Whoever waits for an output takes the engine's next step, for all; callers in other threads wait meanwhile. A
    step puts each output into the mailbox of its run, so runs may be interleaved, nested or left in any order."""

    def __init__(self, engine: EngineCore, outputs: OutputProcessor) -> None:
        self._engine = engine
        self._outputs = outputs
        self._ids = itertools.count()
        self._mailboxes: dict[str, _Mailbox] = {}  # by request id
        # What follows is guarded by the condition, whose lock is never held while the engine works. The engine belongs
        # to the thread that set `_stepping`.
        self._turn = threading.Condition()
        self._inbox: list[AddRequest | Abort] = []
        self._stepping = False
        self._closed = False

    def run(self, requests: Sequence[AddRequest]) -> Generator[tuple[int, RequestOutput], None, None]:
        """Yields outputs of these requests as they come, each with its request's number among them. The requests get
        ids of this engine's own. Leaving early aborts what is unfinished. Raises what ended one of them; the others end
        with it."""
        numbers = {str(next(self._ids)): number for number, request in enumerate(requests)}
        messages = [
            msgspec.structs.replace(request, request_id=request_id)
            for request_id, request in zip(numbers, requests, strict=True)
        ]
        mailbox = _Mailbox()
        try:
            self._submit(messages, mailbox)
            while numbers:
                item = self._next(mailbox)
                if isinstance(item, Exception):
                    raise item
                number = numbers[item.request_id]
                if item.finished:
                    del numbers[item.request_id], self._mailboxes[item.request_id]
                yield number, item
        finally:
            self._leave(numbers)

    def close(self, reason: str) -> None:
        """Ends the engine. Runs that are open end with EngineDead, and so do later ones."""
        self._wait_for_turn()
        try:
            self._closed = True
            self._fail_all(EngineDead(f"the engine was closed: {reason}"))
            self._engine.drain()
            self._engine.close(reason)
        finally:
            self._end_turn()

    def tend(self, call: Callable[[EngineCore], T]) -> T:
        """Calls with the engine between two of its steps, and returns what comes of it."""
        self._wait_for_turn()
        try:
            if self._closed:
                raise EngineDead("the engine is closed")
            return call(self._engine)
        finally:
            self._end_turn()

    def _submit(self, messages: Sequence[AddRequest], mailbox: _Mailbox) -> None:
        with self._turn:
            if self._closed:
                raise EngineDead("the engine is closed")
            self._mailboxes.update((message.request_id, mailbox) for message in messages)
            self._inbox += messages

    def _next(self, mailbox: _Mailbox) -> RequestOutput | Exception:
        """Waits for news: takes steps, or lets another thread take them."""
        while not mailbox:
            with self._turn:
                while self._stepping and not mailbox:
                    self._turn.wait()
                if mailbox:
                    break
                self._stepping = True
            self._step()
        return mailbox.popleft()

    def _leave(self, request_ids: Iterable[str]) -> None:
        """Nobody waits for these any more. May run whenever an iterator is collected as garbage, in a step of this very
        thread: the step's owner then does what is in the inbox."""
        with self._turn:
            left = [
                Abort(request_id) for request_id in request_ids if self._mailboxes.pop(request_id, None) is not None
            ]
            self._inbox += left
            if not left or self._stepping or self._closed:
                return
            self._stepping = True
        try:
            self._take_in()
            self._deal(self._engine.drain())  # what they hold is given back now
        except Exception as error:  # noqa: BLE001 - whoever leaves does not wait for what failed: others do
            self._fail_all(error)
        finally:
            self._end_turn()

    def _wait_for_turn(self) -> None:
        with self._turn:
            while self._stepping:
                self._turn.wait()
            self._stepping = True

    def _end_turn(self) -> None:
        while True:
            with self._turn:
                if not self._inbox or self._closed:
                    self._stepping = False
                    self._turn.notify_all()
                    return
            self._take_in()

    def _step(self) -> None:
        try:
            self._take_in()
            if self._engine.has_work:
                self._deal(self._engine.step())
            else:  # nothing would ever come
                self._fail_all(RequestAborted("the engine does not know the request any more"))
        except Exception as error:  # noqa: BLE001 - every run learns of it
            self._fail_all(error)
        finally:
            self._end_turn()

    def _take_in(self) -> None:
        """What callers have asked for since the last step."""
        with self._turn:
            messages, self._inbox = self._inbox, []
        for message in messages:
            if isinstance(message, Abort):
                self._outputs.drop(message.request_id)
                self._deal(self._engine.abort(message.request_id))
                continue
            try:
                self._engine.add(message)
                self._outputs.add(message)
            except Exception as error:  # noqa: BLE001 - refused: its run raises it
                self._put(message.request_id, error)

    def _deal(self, deltas: Sequence[SequenceDelta]) -> None:
        for delta in deltas:
            received = receive(self._outputs, delta)
            if received.abort is not None:
                self._engine.abort(received.abort.request_id, received.abort.index, received.abort.reason)
            if received.item is not None:
                self._put(delta.request_id, received.item)

    def _put(self, request_id: str, item: RequestOutput | Exception) -> None:
        mailbox = self._mailboxes.get(request_id)
        if mailbox is not None:
            mailbox.append(item)

    def _fail_all(self, error: Exception) -> None:
        """Requests whose outputs have all come keep them: a mailbox is read in order."""
        if not isinstance(error, AnychipError):
            log.exception("the engine failed")
        for mailbox in {id(mailbox): mailbox for mailbox in list(self._mailboxes.values())}.values():
            mailbox.append(error)
