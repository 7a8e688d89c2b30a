"""Grammars are tried side by side: a slow one delays neither what is known nor others, and too many are refused."""

from __future__ import annotations

import asyncio

import pytest

from anychip.errors import InvalidRequest, QueueFull
from anychip.sampling_params import StructuredOutput
from anychip.structured_output import checker
from anychip.structured_output.checker import CheckerSpec, GrammarChecker


class Scripted(GrammarChecker):
    """Children are a script: "slow..." answers when `release` is set, "late..." takes too long, "bad..." is wrong."""

    def __init__(self) -> None:
        super().__init__(lambda: CheckerSpec("", 1, (0,)), deadline_s=1)
        self.release = asyncio.Event()
        self.asked: list[str] = []
        self.running = self.most_running = 0

    async def _ask(self, wanted: StructuredOutput) -> str:
        self.asked.append(wanted.value)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if wanted.value.startswith("slow"):
                await self.release.wait()
            if wanted.value.startswith("late"):
                raise InvalidRequest("took more than 1.0 s")
            return "it is wrong" if wanted.value.startswith("bad") else ""
        finally:
            self.running -= 1


def regex(value: str) -> StructuredOutput:
    return StructuredOutput("regex", value)


async def begun(*coroutines) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_known_grammars_and_other_tenants_pass_a_slow_one():
    async def run() -> None:
        checks = Scripted()
        await checks.check(regex("good"), "a")
        slow = await begun(*(checks.check(regex(f"slow{i}"), "a") for i in range(8)))
        assert checks.running == 2
        await checks.check(regex("good"), "a")
        for number in range(20):
            await checks.check(regex(f"new{number}"), "b")
        with pytest.raises(InvalidRequest, match="it is wrong"):
            await checks.check(regex("bad"), "b")
        assert not any(task.done() for task in slow)
        checks.release.set()
        await asyncio.gather(*slow)

    asyncio.run(run())


def test_one_slow_grammar_leaves_room_for_its_own_tenants_others():
    async def run() -> None:
        checks = Scripted()
        (slow,) = await begun(checks.check(regex("slow")))
        await checks.check(regex("new"))
        assert not slow.done()
        checks.release.set()
        await slow

    asyncio.run(run())


def test_a_grammar_that_took_too_long_is_tried_again_and_verdicts_are_not():
    async def run() -> list[str]:
        checks = Scripted()
        for value in ("late", "late", "bad", "bad"):
            with pytest.raises(InvalidRequest):
                await checks.check(regex(value))
        return checks.asked

    assert asyncio.run(run()) == ["late", "late", "bad"]


def test_too_many_checks_are_refused_and_their_places_come_back():
    async def run() -> None:
        checks = Scripted()
        open_ones = await begun(*(checks.check(regex(f"slow{i}"), "a") for i in range(checker._MAX_OPEN_OF_TENANT)))
        with pytest.raises(QueueFull, match="8 grammars of this key are being checked, at most 8") as refused:
            await checks.check(regex("one more"), "a")
        assert refused.value.retry_after == 1
        others = await begun(
            *(
                checks.check(regex(f"slow{i}-{t}"), f"t{t}")
                for t in range(7)
                for i in range(checker._MAX_OPEN_OF_TENANT)
            )
        )
        with pytest.raises(QueueFull, match="64 grammars are being checked, at most 64"):
            await checks.check(regex("one more"), "z")
        assert checks.most_running == checker._CHILDREN
        open_ones[0].cancel()  # its client went away
        open_ones[-1].cancel()
        await asyncio.gather(open_ones[0], open_ones[-1], return_exceptions=True)
        checks.release.set()
        await asyncio.gather(*open_ones[1:-1], *others)
        await checks.check(regex("one more"), "a")
        assert not checks._open and not checks._rooms

    asyncio.run(run())


CHILD = """
import json, sys, time
print('""', flush=True)
sys.stdin.readline()
for line in sys.stdin:
    value = json.loads(line)["value"]
    if value == "dies":
        sys.exit(1)
    time.sleep(60 if value == "slow" else 0)
    print(json.dumps("wrong" if value == "bad" else ""), flush=True)
"""


def test_children_answer_are_killed_when_they_are_late_and_leave_nothing(monkeypatch):
    start = asyncio.create_subprocess_exec

    async def scripted(program: str, *_: str, **options: object) -> asyncio.subprocess.Process:
        return await start(program, "-c", CHILD, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", scripted)

    async def run() -> None:
        checks = GrammarChecker(lambda: CheckerSpec("", 1, (0,)), deadline_s=0.3)
        slow = asyncio.create_task(checks.check(regex("slow"), "a"))
        for value, problem in (("good", None), ("bad", "wrong"), ("dies", "broke its compiler"), ("fine", None)):
            if problem is None:
                await checks.check(regex(value))
            else:
                with pytest.raises(InvalidRequest, match=problem):
                    await checks.check(regex(value))
        with pytest.raises(InvalidRequest, match=r"took more than 0.3 s"):
            await slow
        children = list(checks._children)
        assert children == checks._idle and len(children) == 1
        await checks.close()
        assert not checks._children and all(child.returncode is not None for child in children)

    asyncio.run(run())
