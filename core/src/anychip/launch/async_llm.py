"""AsyncLLM: the engine in a process of its own, for servers. The process that holds this never loads torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anychip.config import EngineConfig, EngineSpec
from anychip.engine.async_engine import AsyncEngine
from anychip.engine.input_processor import InputProcessor, Prompt
from anychip.engine.output_processor import OutputProcessor
from anychip.engine.outputs import RequestOutput
from anychip.errors import EngineDead, InvalidRequest
from anychip.hub import located
from anychip.launch.child import Child
from anychip.launch.folder import private_folder
from anychip.messages import WorkerReady
from anychip.model_config import load_model_config
from anychip.sampling_params import SamplingParams
from anychip.tokenizer.tokenizer import Tokenizer

_WATCH_INTERVAL_S = 0.25
_DRAIN_S = 5.0


class AsyncLLM:
    """`start` returns once the engine is ready; `close` ends its process."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = located(config)
        self.model = load_model_config(self.config.model)
        self._folder = private_folder()
        self._child: Child | None = None
        self._watch: asyncio.Task[None] | None = None
        self.tokenizer: Tokenizer | None = None
        self.max_model_len = 0

    async def start(self) -> WorkerReady:
        """Starts the engine process; the tokenizer is read meanwhile. Raises what kept the engine from starting."""
        folder = Path(self._folder.name)
        self.engine = AsyncEngine(folder)
        self.engine.bind()
        self._child = Child("anychip.launch.engine_main", EngineSpec(config=self.config, folder=str(folder)))
        self._watch = asyncio.create_task(self._watch_child(self._child))
        if not self.config.skip_tokenizer:
            self.tokenizer = Tokenizer.load(self.config.tokenizer or self.config.model, self.model.vocab_size)
        ready = await self.engine.ready()
        self.max_model_len = ready.max_model_len
        self.inputs = InputProcessor(
            tokenizer=self.tokenizer,
            vocab_size=self.model.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=self.model.eos_token_ids,
        )
        self.engine.attach(OutputProcessor(self.tokenizer))
        return ready.worker

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """What the model's makers recommend, unless the configuration leaves that out."""
        return {} if self.config.generation_config == "none" else self.model.sampling_defaults

    @property
    def dead(self) -> Exception | None:
        """What ended the engine; None while it lives."""
        return self.engine.dead

    def generate(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Checks the request at once, raising InvalidRequest, or EngineDead when there is no engine to run it; the
        iterator then streams its outputs."""
        if self.engine.dead is not None:
            raise self.engine.dead
        request = self.inputs.process(
            request_id,
            prompt,
            sampling,
            priority=priority,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
        )
        return self.engine.generate(request)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model wants it."""
        if self.tokenizer is None:
            raise InvalidRequest("chat needs the tokenizer, which is off", param="messages")
        return self.tokenizer.apply_chat_template(messages)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await self.engine.close()
        if self._child is not None:
            # An engine that is still starting does not read messages.
            await asyncio.to_thread(self._child.stop, _DRAIN_S if self.engine.is_ready else 0.0)
        self._folder.cleanup()

    async def _watch_child(self, child: Child) -> None:
        while (code := child.exit_code()) is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        # Its last message may still be on the way, and says more than the status.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(_WATCH_INTERVAL_S)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        self.engine.fail(EngineDead(f"the engine process {how}; its log says more"))
