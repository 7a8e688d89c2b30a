"""Tries a request's grammar before the engine sees it, in a process that is killed when it takes too long.

The child reads one JSON line a grammar and answers with one line: "" for fine, or what is wrong with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from anychip.config import child_environment
from anychip.errors import InvalidRequest
from anychip.sampling_params import StructuredOutput

_REMEMBERED = 512


class CheckerSpec(msgspec.Struct, frozen=True):
    """What the child is told first."""

    tokenizer_json: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class GrammarChecker:
    """One child, started when the first grammar comes; grammars are tried one at a time. `spec` is asked for then."""

    def __init__(self, spec: Callable[[], CheckerSpec], *, deadline_s: float) -> None:
        self._spec = spec
        self._deadline_s = deadline_s
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._verdicts: OrderedDict[StructuredOutput, str] = OrderedDict()

    async def check(self, wanted: StructuredOutput) -> None:
        """Raises InvalidRequest for a grammar that is wrong, or takes too long to compile."""
        async with self._turn:
            if wanted not in self._verdicts:
                self._verdicts[wanted] = await self._ask(wanted)
                if len(self._verdicts) > _REMEMBERED:
                    self._verdicts.popitem(last=False)
        if verdict := self._verdicts.get(wanted, ""):
            raise InvalidRequest(verdict, param=wanted.kind)

    async def close(self) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()
        self._child = None

    async def _ask(self, wanted: StructuredOutput) -> str:
        if self._child is None or self._child.returncode is not None:
            self._child = await self._start()
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(msgspec.json.encode(wanted) + b"\n")
        try:
            line = await asyncio.wait_for(child.stdout.readline(), self._deadline_s)
        except TimeoutError:
            await self.close()
            return f"the {wanted.kind} took more than {self._deadline_s:.0f} s to compile; simplify it"
        except BaseException:
            await self.close()  # an answer that nobody waits for must not be taken for the next one's
            raise
        if not line:
            await self.close()
            return f"the {wanted.kind} broke its compiler; simplify it"
        return msgspec.json.decode(line, type=str)

    async def _start(self) -> asyncio.subprocess.Process:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "anychip.structured_output.check_main",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=child_environment({}),
            limit=2**20, start_new_session=True,
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(msgspec.json.encode(self._spec()) + b"\n")
        await child.stdout.readline()  # ready: reading the tokenizer is not the grammar's time
        return child
