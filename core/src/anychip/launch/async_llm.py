"""AsyncLLM: the engine in a process of its own, for servers, watched and started again when it dies. The process that
holds this never loads torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from anychip.config import EngineConfig, EngineSpec
from anychip.engine.async_engine import AsyncEngine
from anychip.engine.input_processor import InputProcessor, Prompt, RequestOptions
from anychip.engine.input_threads import InputThreads
from anychip.engine.output_processor import OutputProcessor
from anychip.engine.outputs import RequestOutput
from anychip.errors import AnychipError, EngineDead, QueueFull, RequestAborted
from anychip.hub import located
from anychip.launch.build import load_tokenizer
from anychip.launch.child import Child
from anychip.launch.folder import private_folder
from anychip.messages import AddRequest, EngineReady, EngineStats, WorkerReady
from anychip.model_config import load_model_config
from anychip.observability.flow import Flow
from anychip.observability.metrics import Metrics, RequestClock
from anychip.observability.tracing import Tracer
from anychip.sampling_params import SamplingParams
from anychip.structured_output.checker import CheckerSpec, GrammarChecker
from anychip.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("anychip.engine")

_WATCH_INTERVAL_S = 0.1
_DRAIN_S = 5.0
_RESTART_WINDOW_S = 600.0


class AsyncLLM:
    """`start` returns once the engine is ready; `close` ends its process. An engine that dies is started again, at
    most `restarts` times in ten minutes; requests fail until it is ready."""

    def __init__(self, config: EngineConfig, *, restarts: int = 5, otel_endpoint: str | None = None) -> None:
        self.config = located(config)
        self.model = load_model_config(self.config.model)
        self.metrics = Metrics(config.public_name)
        self.flow = Flow()
        self.threads = InputThreads()
        self.tracer = None if otel_endpoint is None else Tracer(otel_endpoint, config.public_name)
        self.tokenizer: Tokenizer | None = None
        self.max_model_len = 0
        self._max_restarts = restarts
        self._restarted_at: deque[float] = deque()
        self._life: _Life | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._progress_at = time.monotonic()

    async def start(self) -> WorkerReady:
        """Starts the engine process; the tokenizer is read meanwhile. Raises what kept the engine from starting."""
        self._life = _Life(self.config)
        if not self.config.skip_tokenizer:
            self.tokenizer = load_tokenizer(self.config, self.model)
        ready = await self._life.engine.ready()
        self.max_model_len = ready.max_model_len
        self.inputs = InputProcessor(
            tokenizer=self.tokenizer,
            vocab_size=self.model.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
        )
        self.grammars = self._grammar_checker()
        self._adopt(ready)
        self._supervisor = asyncio.create_task(self._supervise())
        return ready.worker

    # -- what it is ---------------------------------------------------------------------------------------

    @property
    def engine(self) -> AsyncEngine:
        """The engine that lives, or lived last."""
        assert self._life is not None, "start first"
        return self._life.engine

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
        size = len(prompt) + sum(map(len, sampling.bad_words))
        request = await self.threads.run(size, self.inputs.process, request_id, prompt, sampling, options)
        if sampling.structured is not None and self.grammars is not None:
            await self.grammars.check(sampling.structured)
        headers = {} if options is None else options.trace_headers
        clock = RequestClock(self.metrics, self.config.public_name, arrived)
        return self._timed(request, self.engine.generate(request), clock, headers)

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
            clock.end(error)
            self._record(request, clock, trace, error)

    def _record(
        self, request: AddRequest, clock: RequestClock, trace: Mapping[str, str], error: BaseException | None
    ) -> None:
        if self.tracer is None:
            return
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            error = RequestAborted("the client went away")
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
        assert self._life is not None
        self._life.kill(why)

    # -- life ---------------------------------------------------------------------------------------------

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._life is not None:
            await self._life.end(_DRAIN_S)
        if self._supervisor is not None and self.grammars is not None:
            await self.grammars.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)
        self.threads.close()

    async def _supervise(self) -> None:
        while True:
            assert self._life is not None
            cause = await self._life.ended()
            self.metrics.engine_ended()
            await self._life.end(_DRAIN_S)
            if not self._may_restart():
                log.error("the engine is not started again: %s", cause)
                return
            log.warning("the engine died and is started again: %s", cause)
            await self._restart()

    def _may_restart(self) -> bool:
        now = time.monotonic()
        while self._restarted_at and now - self._restarted_at[0] > _RESTART_WINDOW_S:
            self._restarted_at.popleft()
        if len(self._restarted_at) >= self._max_restarts:
            return False
        self._restarted_at.append(now)
        return True

    async def _restart(self) -> None:
        """Requests see the old engine, which is dead, until the new one is ready."""
        began, life = time.monotonic(), _Life(self.config)
        self.metrics.restarts.inc()
        try:
            ready = await life.engine.ready()
        except AnychipError as error:
            log.error("the engine could not be started again: %s", error)
        except asyncio.CancelledError:
            await life.end(0.0)
            raise
        else:
            log.warning("the engine is ready again after %.1f s", time.monotonic() - began)
            self._life = life
            self._adopt(ready)
            return
        self._life = life  # dead: the supervisor tries again as long as it may

    def _adopt(self, ready: EngineReady) -> None:
        self.worker = ready.worker
        self._progress_at = time.monotonic()
        self.engine.attach(OutputProcessor(self.tokenizer), self._take)
        self.metrics.engine_started(ready.worker.memory.num_blocks - 1)

    def _take(self, stats: EngineStats) -> None:
        self._progress_at = time.monotonic()
        self.metrics.take(stats)

    def _grammar_checker(self) -> GrammarChecker | None:
        tokenizer, model = self.tokenizer, self.model
        if tokenizer is None:
            return None

        def spec() -> CheckerSpec:
            return CheckerSpec(tokenizer.raw.to_str(), model.vocab_size, tuple(model.eos_token_ids))

        return GrammarChecker(spec, deadline_s=self.config.grammar_timeout_s)


class _Life:
    """One engine process, its sockets and their folder."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder: TemporaryDirectory[str] = private_folder()
        folder = Path(self._folder.name)
        self.engine = AsyncEngine(folder)
        self.engine.bind()
        self._child = Child("anychip.launch.engine_main", EngineSpec(config=config, folder=str(folder)))
        self._death = asyncio.create_task(self._watch())

    async def ended(self) -> AnychipError:
        """Waits until there is no engine to talk to; its requests have failed then. Its process may still live."""
        await self._death
        assert self.engine.dead is not None
        return self.engine.dead

    async def end(self, drain_s: float) -> None:
        """Ends the process, which has `drain_s` to do so by itself."""
        self._death.cancel()
        await self.engine.close()
        # An engine that is still starting does not read messages.
        await asyncio.to_thread(self._child.stop, drain_s if self.engine.is_ready else 0.0)
        self._folder.cleanup()

    def kill(self, why: str) -> None:
        self.engine.fail(EngineDead(f"the engine was ended: {why}"))
        self._child.kill()

    async def _watch(self) -> None:
        while (code := self._child.exit_code()) is None:
            if self.engine.dead is not None:
                return
            await asyncio.sleep(_WATCH_INTERVAL_S)
        # Its last message may still be on the way, and says more than the status.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(_WATCH_INTERVAL_S)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        self.engine.fail(EngineDead(f"the engine process {how}; its log says more"))
