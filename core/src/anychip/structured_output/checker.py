"""Tries a request's grammar before the engine sees it, in processes that are killed when they take too long.

A child reads one JSON line a grammar and answers with one line: "" for fine, or what is wrong with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable

import msgspec

from anychip.environment import child_environment
from anychip.errors import InvalidRequest, QueueFull
from anychip.sampling_params import StructuredOutput

_REMEMBERED = 512
_CHILDREN = 3
_AT_ONCE = 2
"""Children that one tenant may keep busy: another's grammar finds a free one, and one slow grammar leaves one free."""

_MAX_OPEN, _MAX_OPEN_OF_TENANT = 64, 8
"""Checks that wait or run."""


class CheckerSpec(msgspec.Struct, frozen=True):
    """What a child is told first."""

    tokenizer_json: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class GrammarChecker:
    """Children are started when grammars come that find none free. `spec` is asked for then. Verdicts are remembered;
    that a grammar took too long is none, since the machine may have been busy."""

    def __init__(self, spec: Callable[[], CheckerSpec], *, deadline_s: float) -> None:
        self._spec = spec
        self._deadline_s = deadline_s
        self._children: list[asyncio.subprocess.Process] = []
        self._idle: list[asyncio.subprocess.Process] = []
        self._room = asyncio.Semaphore(_CHILDREN)
        self._rooms: dict[str, asyncio.Semaphore] = {}  # by tenant, of those that have checks open
        self._open: Counter[str] = Counter()
        self._verdicts: OrderedDict[StructuredOutput, str] = OrderedDict()

    async def check(self, wanted: StructuredOutput, tenant: str = "") -> None:
        """Raises InvalidRequest for a grammar that is wrong, or takes too long to compile; QueueFull when too many
        are being checked."""
        verdict = self._verdicts.get(wanted)
        if verdict is None:
            async with self._place(tenant):
                verdict = self._verdicts.get(wanted)  # a check that was ahead may have been of the same grammar
                if verdict is None:
                    verdict = await self._ask(wanted)
            self._remember(wanted, verdict)
        else:
            self._verdicts.move_to_end(wanted)
        if verdict:
            raise InvalidRequest(verdict, param=wanted.kind)

    async def close(self) -> None:
        """Ends the children, those that are busy as well."""
        for child in list(self._children):
            await self._end(child)

    @contextlib.asynccontextmanager
    async def _place(self, tenant: str) -> AsyncIterator[None]:
        """Waits for a child to be free: first for one of the tenant's share, then for any."""
        self._check_open(tenant)
        self._open[tenant] += 1
        room = self._rooms.setdefault(tenant, asyncio.Semaphore(_AT_ONCE))
        try:
            async with room, self._room:
                yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant], self._rooms[tenant]

    def _check_open(self, tenant: str) -> None:
        """Raises QueueFull."""
        whose = ((self._open[tenant], _MAX_OPEN_OF_TENANT, " of this key"), (self._open.total(), _MAX_OPEN, ""))
        for count, most, of in whose:
            if count >= most:
                raise QueueFull(
                    f"{count} grammars{of} are being checked, at most {most} may be; send it again in a moment",
                    retry_after=1,
                )

    def _remember(self, wanted: StructuredOutput, verdict: str) -> None:
        self._verdicts[wanted] = verdict
        self._verdicts.move_to_end(wanted)
        if len(self._verdicts) > _REMEMBERED:
            self._verdicts.popitem(last=False)

    async def _ask(self, wanted: StructuredOutput) -> str:
        """A child's verdict. Raises InvalidRequest where there is none."""
        child = self._idle.pop() if self._idle else await self._start()
        assert child.stdin is not None and child.stdout is not None
        line = b""
        try:
            child.stdin.write(msgspec.json.encode(wanted) + b"\n")
            line = await asyncio.wait_for(child.stdout.readline(), self._deadline_s)
        except TimeoutError:
            raise InvalidRequest(
                f"the {wanted.kind} took more than {self._deadline_s:.1f} s to compile; simplify it, or try again if "
                "the server is busy",
                param=wanted.kind,
            ) from None
        finally:
            if line:
                self._idle.append(child)
            else:  # an answer that nobody waits for must not be taken for the next one's
                await self._end(child)
        if not line:
            raise InvalidRequest(f"the {wanted.kind} broke its compiler; simplify it", param=wanted.kind)
        return msgspec.json.decode(line, type=str)

    async def _start(self) -> asyncio.subprocess.Process:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "anychip.structured_output.check_main",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=child_environment({}),
            limit=2**20, start_new_session=True,
        )  # fmt: skip
        self._children.append(child)
        assert child.stdin is not None and child.stdout is not None
        try:
            spec = await asyncio.to_thread(lambda: msgspec.json.encode(self._spec()))  # the tokenizer may be megabytes
            child.stdin.write(spec + b"\n")
            await child.stdout.readline()  # ready: reading the tokenizer is not the grammar's time
        except BaseException:
            await self._end(child)
            raise
        return child

    async def _end(self, child: asyncio.subprocess.Process) -> None:
        if child in self._idle:
            self._idle.remove(child)
        if child in self._children:
            self._children.remove(child)
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
