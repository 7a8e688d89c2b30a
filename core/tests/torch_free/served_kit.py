"""The application in process, over an engine that is a script: what routes and gate do, without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
from starlette.types import ASGIApp
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from anychip.config import EngineConfig
from anychip.engine.async_engine import AsyncEngine
from anychip.engine.input_processor import InputProcessor
from anychip.engine.input_threads import InputThreads
from anychip.engine.ipc import encoder
from anychip.engine.outputs import RequestOutput, SequenceOutput
from anychip.entrypoints.http.app import make_app
from anychip.launch.served_adapters import ServedAdapters
from anychip.observability.metrics import Metrics
from anychip.server_config import ServerConfig
from anychip.step_messages import TokenLogprobs
from anychip.tasks.served import ServedTask
from anychip.tokenizer.chat_template import ChatTemplate
from anychip.tokenizer.detokenizer import Detokenizer
from anychip.tokenizer.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if tools %}{{ tools }}{% endif %}"


def byte_tokenizer() -> Tokenizer:
    """A token a byte: characters beyond ASCII are several tokens."""
    vocabulary = {name: number for number, name in enumerate(sorted(ByteLevel.alphabet()))}
    raw = RawTokenizer(BPE(vocabulary, []))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevelDecoder()
    return Tokenizer(raw, ChatTemplate(TEMPLATE, {}))


class ScriptedLLM:
    """AsyncLLM as routes see it. `answer` is what every sequence says; `asked` are the sampling and options that came.
    With `gap`, a token a time and so many seconds apart; `open` counts the generations that run."""

    def __init__(self, answer: str = "ok", *, gap: float | None = None) -> None:
        self.config = EngineConfig(served_model_name="m")
        self.metrics = Metrics("m")
        self.adapters = ServedAdapters("m", self._no_engine, self.metrics)
        self.tokenizer = byte_tokenizer()
        self.threads = InputThreads()
        self.model = type("Model", (), {"vocab_size": 256})()
        self.served = ServedTask(task="generate", why="a script")
        self.sampling_defaults: dict[str, float] = {}
        self.max_model_len = 1 << 20
        self.inputs = InputProcessor(
            tokenizer=self.tokenizer, vocab_size=256, max_model_len=self.max_model_len, eos_token_ids=(0,)
        )
        self.dead = None
        self.silent_s = 0.0
        self.answer = answer
        self.gap = gap
        self.open = self.most_open = 0
        self.asked: list[tuple[Any, ...]] = []
        self.apps: dict[ServerConfig | None, ASGIApp] = {}

    def _no_engine(self) -> AsyncEngine:
        raise AssertionError("a script has no engine")

    async def accept(
        self, request_id: str, prompt: Any, sampling: Any, options: Any = None
    ) -> AsyncGenerator[RequestOutput]:
        message = self.inputs.process(request_id, prompt, sampling, options)
        encoder.encode(message)  # as it would go to the engine
        self.asked.append((prompt, sampling, options))
        return self._run(request_id, message.prompt_token_ids, sampling)

    async def _run(self, request_id: str, prompt: list[int], sampling: Any) -> AsyncGenerator[RequestOutput]:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            ids = self.tokenizer.encode(self.answer)
            steps = [ids] if self.gap is None else [[i] for i in ids]
            detokenizer = Detokenizer(self.tokenizer, prompt, skip_special_tokens=sampling.skip_special_tokens)
            for number, new in enumerate(steps):
                last = number == len(steps) - 1
                text = detokenizer.add(new) + (detokenizer.rest() if last else "")
                yield RequestOutput(
                    request_id=request_id,
                    prompt_token_ids=prompt,
                    prompt_logprobs=self._scores(prompt[1:], sampling.prompt_logprobs) if number == 0 else None,
                    outputs=[self._piece(index, new, text, sampling, last) for index in range(sampling.n)],
                    finished=last,
                )
                if self.gap is not None:
                    await asyncio.sleep(self.gap)
        finally:
            self.open -= 1

    def _piece(self, index: int, ids: list[int], text: str, sampling: Any, last: bool) -> SequenceOutput:
        return SequenceOutput(
            index=index,
            token_ids=list(ids),
            text=text,
            logprobs=self._scores(ids, sampling.logprobs),
            finish_reason="stop" if last else None,
        )

    def _scores(self, ids: list[int], top: int | None) -> list[TokenLogprobs] | None:
        if top is None:
            return None
        likeliest = [list(range(t, t + top)) for t in ids]
        return [TokenLogprobs(-1.0, [i % 256 for i in ids], [-1.0] * top) for ids in likeliest]


def with_client(
    llm: ScriptedLLM, use: Callable[[httpx.AsyncClient], Any], config: ServerConfig | None = None, **headers: str
) -> Any:
    """What `use` makes of a client of the application, which is built once for an engine."""
    if config not in llm.apps:
        llm.apps[config] = make_app(llm, config)  # type: ignore[arg-type]

    async def run() -> Any:
        transport = httpx.ASGITransport(llm.apps[config])
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return await use(client)

    return asyncio.run(run())
