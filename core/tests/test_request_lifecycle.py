"""Traces docs/request-lifecycle.md: the frames from the HTTP handler to the attention kernel, and the hops."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import FrameType

import httpx
import pytest

from anychip.config import EngineConfig
from anychip.engine.async_engine import AsyncEngine
from anychip.entrypoints.http.app import make_app
from anychip.launch import async_llm, engine_main, engine_process
from anychip.launch.async_llm import AsyncLLM
from anychip.process_specs import EngineSpec
from anychip_cpu import native

PAGE = Path(__file__).parents[2] / "docs" / "request-lifecycle.md"
MAX_FRAMES, MAX_HOPS = 20, 2


class EngineThread:
    """launch.child.Child, but the engine runs in a thread, so that one trace sees both sides."""

    def __init__(self, module: str, spec: EngineSpec) -> None:
        self._thread = threading.Thread(target=engine_main.main, args=(spec,))
        self._thread.start()

    def exit_code(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def stop(self, deadline_s: float) -> None:
        self._thread.join(deadline_s)


def frames_of_ours(frame: FrameType | None, until: str | None = None) -> list[str]:
    """Names of anychip's functions on the stack, outermost first, from `until` on."""
    names: list[str] = []
    while frame is not None:
        named = not frame.f_code.co_name.startswith("<")  # a comprehension is no function of its own
        if named and "/anychip" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename:
            names.append(frame.f_code.co_qualname)
            if frame.f_code.co_qualname == until:
                break
        frame = frame.f_back
    return names[::-1]


async def traced_request(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str], list[str]]:
    created: dict[asyncio.Task, list[str]] = {}
    api: list[str] = []
    kernel: list[str] = []
    hops: list[str] = []

    def make_task(loop, coroutine, **more):
        parent = asyncio.current_task() if loop.is_running() else None
        task = asyncio.Task(coroutine, loop=loop, **more)
        created[task] = [*created.get(parent, []), *frames_of_ours(sys._getframe())]
        return task

    send = AsyncEngine._send

    def watched_send(self, message):
        if not api:
            task = asyncio.current_task()
            above = [name for name in frames_of_ours(sys._getframe()) if "watched" not in name]
            api.extend([*created.get(task, []), *above, "AsyncEngine._send"])
        hops.append(type(message).__name__)
        send(self, message)

    kernels = native.load("")
    attention = kernels.attention

    def watched_kernel(*args):
        names = frames_of_ours(sys._getframe(), until="EngineLoop.run")
        if not kernel and names[0] == "EngineLoop.run":
            kernel.extend(names)
        return attention(*args)

    monkeypatch.setattr(AsyncEngine, "_send", watched_send)
    monkeypatch.setattr(kernels, "attention", watched_kernel)
    monkeypatch.setattr(engine_process, "Child", EngineThread)
    asyncio.get_running_loop().set_task_factory(make_task)

    llm = AsyncLLM(EngineConfig(device="cpu", num_kv_blocks=256, device_options={"graphs": "off"}))
    await llm.start()
    deliver = AsyncEngine._deliver

    async def watched_deliver(self, message):
        if "Outputs" not in hops:
            hops.append("Outputs")
        await deliver(self, message)

    monkeypatch.setattr(AsyncEngine, "_deliver", watched_deliver)
    try:
        transport = httpx.ASGITransport(make_app(llm))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
            answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return api, kernel, list(hops)  # before the engine is told to stop
    finally:
        await llm.close()


@pytest.mark.skipif(not native.usable(), reason="the page lists the way to a compiled kernel")
def test_the_page_lists_what_a_request_really_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    api, kernel, hops = asyncio.run(traced_request(monkeypatch))
    api = api[api.index("openai_routes.<locals>.chat") :]  # the gate's frames are before the handler's
    block = PAGE.read_text().split("```text\n")[1].split("```")[0]
    assert [*api, "--- hop 1", *kernel] == block.split("\n")[:-1]
    assert len(api) + len(kernel) <= MAX_FRAMES
    assert hops == ["AddRequest", "Outputs"]
    assert len(hops) <= MAX_HOPS


def test_the_page_has_twelve_stations_whose_files_exist() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == 12
    source = Path(async_llm.__file__).parents[1]
    for row in rows:
        for name in row.split("|")[3].split(","):
            name = name.strip()
            if name.startswith("`"):
                path = name.strip("`").split("`")[0]
                assert (source / path).exists(), path
