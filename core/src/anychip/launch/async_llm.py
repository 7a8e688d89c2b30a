"""AsyncLLM: the engine in a process of its own, for servers, watched and started again when it dies. The process that
holds this never loads torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping

import msgspec

from anychip.adapter_files import with_room
from anychip.config import EngineConfig
from anychip.engine.async_engine import AsyncEngine
from anychip.engine.input_processor import InputProcessor, Prompt, RequestOptions
from anychip.engine.input_threads import InputThreads
from anychip.engine.output_processor import OutputProcessor
from anychip.engine.outputs import RequestOutput
from anychip.engine_stats import EngineStats
from anychip.errors import AnychipError, QueueFull, RequestAborted, RequestTimeout
from anychip.hub import located
from anychip.launch.build import load_tokenizer
from anychip.launch.engine_process import EngineProcess
from anychip.launch.served_adapters import ServedAdapters
from anychip.launch.vectors import vector_inputs, with_task
from anychip.messages import AddRequest, EngineReady
from anychip.model_config import load_model_config
from anychip.observability.flow import Flow
from anychip.observability.metrics import Metrics, RequestClock
from anychip.observability.tracing import Tracer
from anychip.sampling_params import SamplingParams
from anychip.structured_output.checker import CheckerSpec, GrammarChecker
from anychip.tokenizer.tokenizer import Tokenizer
from anychip.worker_report import WorkerReady

log = logging.getLogger("anychip.engine")

_DRAIN_S = 5.0
_RESTART_WINDOW_S = 600.0
_LONGEST_PAUSE_S = 30.0
"""Between starts that fail."""


class AsyncLLM:
    """`start` returns once the engine is ready; `close` ends its process. An engine that dies is started again, at
    most `restarts` times in ten minutes; requests fail until it is ready."""

    def __init__(self, config: EngineConfig, *, restarts: int = 5, otel_endpoint: str | None = None) -> None:
        config = with_room(located(config))
        self.model = load_model_config(config.model)
        self.config, self.served = with_task(config, self.model)
        self.metrics = Metrics(config.public_name)
        self.adapters = ServedAdapters(config.public_name, lambda: self.engine, self.metrics)
        self.flow = Flow()
        self.threads = InputThreads()
        self.tracer = None if otel_endpoint is None else Tracer(otel_endpoint, config.public_name)
        self.tokenizer: Tokenizer | None = None
        self.max_model_len = 0
        self._max_restarts = restarts
        self._restarted_at: deque[float] = deque()
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._progress_at = time.monotonic()

    async def start(self) -> WorkerReady:
        """Starts the engine process; the tokenizer is read meanwhile. Raises what kept the engine from starting."""
        self._process = await EngineProcess.begin(self.config)
        if not self.config.skip_tokenizer:
            self.tokenizer = load_tokenizer(self.config, self.model)
        ready = await self._process.engine.ready()
        self.max_model_len = ready.max_model_len
        self.inputs = InputProcessor(
            tokenizer=self.tokenizer,
            vocab_size=self.model.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
            hash_block_size=ready.hash_block_size,
            served=self.served,
        )
        self.vectors = vector_inputs(self.config, self.model, self.served, self.tokenizer, self.max_model_len)
        self.grammars = self._grammar_checker()
        self._adopt(ready)
        for name, folder in self.config.adapters.items():
            await self.adapters.load(name, folder)
        self._supervisor = asyncio.create_task(self._supervise())
        return ready.worker

    # -- what it is ---------------------------------------------------------------------------------------

    @property
    def engine(self) -> AsyncEngine:
        """The engine that lives, or lived last."""
        assert self._process is not None, "start first"
        return self._process.engine

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """What the model's makers recommend, unless the configuration leaves that out."""
        return {} if self.config.generation_config == "none" else self.model.sampling_defaults

    @property
    def dead(self) -> AnychipError | None:
        """What ended the engine; None while it lives."""
        return self.engine.dead

    @property
    def silent_s(self) -> float:
        """How long the engine has given no sign of life."""
        return time.monotonic() - self._progress_at

    # -- requests -----------------------------------------------------------------------------------------

    async def accept(
        self, request_id: str, prompt: Prompt, sampling: SamplingParams, options: RequestOptions | None = None
    ) -> AsyncGenerator[RequestOutput]:
        """Checks the request, raising UserError, or EngineDead when there is no engine to run it; the iterator then
        runs it and streams its outputs."""
        if self.engine.dead is not None:
            raise self.engine.dead
        arrived = time.monotonic()
        self._check_queue()
        limit = None if options is None else options.deadline
        try:
            async with asyncio.timeout(limit) as scope:
                request = await self._prepare(request_id, prompt, sampling, options)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise RequestTimeout(f"request {request_id} was not begun within its deadline of {limit:.1f} s") from error
        if limit is not None:  # what is left of it
            request = msgspec.structs.replace(request, deadline=max(0.0, arrived + limit - time.monotonic()))
        headers = {} if options is None else options.trace_headers
        clock = RequestClock(self.metrics, self.config.public_name, arrived)
        return self._timed(request, self.engine.generate(request), clock, headers)

    async def _prepare(
        self, request_id: str, prompt: Prompt, sampling: SamplingParams, options: RequestOptions | None
    ) -> AddRequest:
        size = len(prompt) + sum(map(len, sampling.bad_words))
        request = await self.threads.run(size, self.inputs.process, request_id, prompt, sampling, options)
        if sampling.structured is not None and self.grammars is not None:
            await self.grammars.check(sampling.structured, "" if options is None else options.tenant)
        return request

    def _check_queue(self) -> None:
        longest = self.config.max_queue_s
        if not self.flow.admits(longest):
            wait = self.flow.wait_s(self.flow.waiting + 1)
            raise QueueFull(
                f"{self.flow.waiting} requests wait and a new one would for {wait:.1f} s, at most {longest} s may pass",
                retry_after=self.flow.retry_after_s(),
            )

    async def _timed(
        self, request: AddRequest, outputs: AsyncGenerator[RequestOutput], clock: RequestClock, trace: Mapping[str, str]
    ) -> AsyncGenerator[RequestOutput]:
        """The same, with its times taken."""
        waits = True
        self.flow.enter()
        error: BaseException | None = None
        try:
            async for output in outputs:
                if waits:
                    waits = False
                    self.flow.leave(served=True)
                clock.piece(output)
                yield output
        except QueueFull as full:
            full.retry_after = self.flow.retry_after_s()
            error = full
            raise
        except BaseException as other:
            error = other
            raise
        finally:
            if waits:
                self.flow.leave(served=False)
            await outputs.aclose()
            if isinstance(error, GeneratorExit | asyncio.CancelledError):
                error = RequestAborted("the client went away")
            clock.end(error)
            self._record(request, clock, trace, error)

    def _record(
        self, request: AddRequest, clock: RequestClock, trace: Mapping[str, str], error: BaseException | None
    ) -> None:
        if self.tracer is None:
            return
        counts = {
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.output_tokens": clock.num_output,
        }
        self.tracer.record(request.request_id, clock.times, counts, headers=trace, error=error)

    async def abort(self, request_id: str) -> bool:
        """Ends a request, whose caller learns so. Returns whether there was one."""
        return await self.engine.abort(request_id)

    async def abort_all(self) -> None:
        """Ends every request with an error."""
        for request_id in self.engine.open_requests:
            await self.engine.abort(request_id)

    def kill_engine(self, why: str) -> None:
        """Ends the engine process at once; a new one is started."""
        assert self._process is not None
        self._process.kill(why)

    # -- life ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])  # it may be starting an engine, which it ends
        if self._process is not None:
            await self._process.end(_DRAIN_S)
        if self._supervisor is not None and self.grammars is not None:
            await self.grammars.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)
        self.threads.close()

    async def _supervise(self) -> None:
        """Replaces an engine that died, as often as may be. Nothing that goes wrong on the way ends this."""
        assert self._process is not None
        while True:
            cause: Exception = await self._process.ended()
            self.metrics.engine_ended()
            num_failed = 0
            while self._may_restart():
                log.warning("the engine died and is started again: %s", cause)
                try:
                    await self._restart()
                    break
                except Exception as error:  # noqa: BLE001 - whatever it is, the next attempt may succeed
                    log.error("the engine could not be started again: %s: %s", type(error).__name__, error)
                    cause = error
                await asyncio.sleep(min(_LONGEST_PAUSE_S, 2.0**num_failed))
                num_failed += 1
            else:
                log.error("the engine is not started again: %s", cause)
                await self._process.end(_DRAIN_S)
                return

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._restarted_at and now - self._restarted_at[0] > _RESTART_WINDOW_S:
            self._restarted_at.popleft()
        if len(self._restarted_at) >= self._max_restarts:
            return False
        self._restarted_at.append(now)
        return True

    async def _restart(self) -> None:
        """Raises what kept the new engine from starting. Requests see the old one, which is dead, until it is ready."""
        assert self._process is not None
        began = time.monotonic()
        self.metrics.restarts.inc()
        await self._process.end(_DRAIN_S)
        process = await EngineProcess.begin(self.config)
        try:
            ready = await process.engine.ready()
            await self.adapters.load_again(process.engine)
        except BaseException:
            await process.end(0.0)
            if process.engine.dead is not None:
                self._process = process  # requests learn the newest cause
            raise
        log.warning("the engine is ready again after %.1f s", time.monotonic() - began)
        self._process = process
        self._adopt(ready)

    def _adopt(self, ready: EngineReady) -> None:
        self.worker = ready.worker
        self._progress_at = time.monotonic()
        self.engine.attach(OutputProcessor(self.tokenizer), self._take)
        self.metrics.engine_started(ready.worker.memory.num_blocks - 1)

    def _take(self, stats: EngineStats) -> None:
        self._progress_at = time.monotonic()
        self.metrics.take(stats)
        self.inputs.weights_version = stats.weights_version

    def _grammar_checker(self) -> GrammarChecker | None:
        tokenizer, model = self.tokenizer, self.model
        if tokenizer is None:
            return None

        def spec() -> CheckerSpec:
            return CheckerSpec(tokenizer.raw.to_str(), model.vocab_size, tuple(model.eos_token_ids))

        return GrammarChecker(spec, deadline_s=self.config.grammar_timeout_s)
