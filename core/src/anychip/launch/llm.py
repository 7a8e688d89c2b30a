"""LLM: the engine in the caller's own process, for programs that embed it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from anychip.adapter_files import with_room
from anychip.config import EngineConfig
from anychip.engine.embedded_prompt import EmbeddedPrompt
from anychip.engine.engine_core import EngineCore
from anychip.engine.input_processor import InputProcessor, Prompt, RequestOptions
from anychip.engine.output_processor import OutputProcessor, merge
from anychip.engine.outputs import RequestOutput
from anychip.engine.shared_engine import SharedEngine
from anychip.engine.vector_inputs import Text, TextPair, VectorAsk
from anychip.engine.vector_outputs import Classified, Ranked, activated, check_dimensions, classified, cut, ranked
from anychip.errors import InvalidRequest, rebuild
from anychip.hub import located
from anychip.launch.adapters import AdapterNames, read_named
from anychip.launch.build import build_engine, load_tokenizer
from anychip.launch.folder import private_folder
from anychip.launch.vectors import vector_inputs, with_task
from anychip.messages import DropAdapter, LoadAdapter
from anychip.model_config import load_model_config
from anychip.prompt_extras import Pooling, PoolingKind, PromptExtras
from anychip.registry.plugins import load_plugins
from anychip.sampling_params import SamplingParams
from anychip.tasks.detect import refusal
from anychip.tasks.served import Task
from anychip.tokenizer.tokenizer import Tokenizer
from anychip.worker_report import WorkerReady

Conversation = Sequence[Mapping[str, Any]]
"""Messages with "role" and "content"."""

_WHOLE = RequestOptions(whole=True)
_ADAPTER_POLL_S = 0.002
"""While an adapter is read."""


class LLM:
    """Keyword arguments are EngineConfig's. Close it, or use it as a context manager.

    Calls do not disturb one another: streams may be interleaved, left half way, or have other calls inside. Several
    threads may call at once; one of them at a time takes the engine's steps, for all of them.

    Example:
        with LLM("path/to/model", device="cpu") as llm:
            for output in llm.generate(["Hello", "Bonjour"], SamplingParams(max_tokens=32)):
                print(output.outputs[0].text)
    """

    def __init__(self, model: str = "quickstart", **settings: Any) -> None:
        config = with_room(located(EngineConfig(model=model, **settings)))
        model_config = load_model_config(config.model)
        self.config, self.served = with_task(config, model_config)
        self.tokenizer: Tokenizer | None = None
        if not self.config.skip_tokenizer:
            self.tokenizer = load_tokenizer(self.config, model_config)
        self.sampling_defaults = {} if self.config.generation_config == "none" else model_config.sampling_defaults
        self._folder = private_folder()
        try:
            self.engine = build_engine(self.config, model_config, load_plugins(), Path(self._folder.name))
        except BaseException:
            self._folder.cleanup()
            raise
        self.inputs = InputProcessor(
            tokenizer=self.tokenizer,
            vocab_size=model_config.vocab_size,
            max_model_len=self.engine.max_model_len,
            eos_token_ids=model_config.eos_token_ids,
            hash_block_size=self.engine.hash_block_size,
            served=self.served,
        )
        length = self.engine.max_model_len
        self.vectors = vector_inputs(self.config, model_config, self.served, self.tokenizer, length)
        self.outputs = OutputProcessor(self.tokenizer)
        _ = self._shared  # made before threads can ask for it
        self.adapters = AdapterNames(self.config.public_name)
        self._adapters_change = threading.Lock()
        try:
            for name, folder in self.config.adapters.items():
                self.load_adapter(name, folder)
        except BaseException:
            self.close()
            raise

    @functools.cached_property
    def _shared(self) -> SharedEngine:
        return SharedEngine(self.engine, self.outputs)

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """The same, of settings that are one value already."""
        return cls(**{name: getattr(config, name) for name in config.__struct_fields__})

    @property
    def worker(self) -> WorkerReady:
        """The workers' report: device, KV cache, memory."""
        return self.engine.executor.ready

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in order. A prompt is text or token ids; one SamplingParams serves all, and without
        any the model's own defaults do. `adapter` is the name of one that is loaded, for all prompts, or a name or None
        for each. Raises what ended a request on the way, such as StepFailed; the others end with it."""
        several = _as_list(prompts)
        params = self._each(sampling, len(several))
        pieces: list[list[RequestOutput]] = [[] for _ in several]
        for number, output in self._run(several, params, self._with_adapters(adapter, len(several))):
            pieces[number].append(output)
        return [merge(outputs) for outputs in pieces]

    def load_adapter(self, name: str, folder: str, *, replace: bool = False) -> None:
        """Reads an adapter in PEFT's form; `generate` takes it by its name from then on. With `replace`, a name that is
        taken gets the new content. Raises AdapterRefused, with everything as it was.

        Example:
            with LLM("path/to/model", max_adapters=4) as llm:
                llm.load_adapter("sql", "path/to/adapter")
                llm.generate("Which table has the orders?", adapter="sql")
        """
        named = read_named(name, folder)
        self.adapters.check_new(named, replace=replace)
        message = LoadAdapter(named.digest, named.folder)
        with self._adapters_change:
            self._shared.tend(lambda engine: engine.adapters.load(message))
            while not (reports := self._shared.tend(EngineCore.tend_adapters)):
                time.sleep(_ADAPTER_POLL_S)
        for report in reports:
            if report.error is not None:
                raise rebuild(*report.error)
        self._drop_adapter(self.adapters.add(named))

    def unload_adapter(self, name: str) -> None:
        """No request begins with the adapter any more; those that have it end first. Raises UnknownModel."""
        self._drop_adapter(self.adapters.remove(name))

    def _drop_adapter(self, digest: bytes | None) -> None:
        def drop(engine: EngineCore) -> None:
            if digest is not None:
                engine.adapters.drop(DropAdapter(digest))
                engine.tend_adapters()

        self._shared.tend(drop)

    def _with_adapters(
        self, adapter: str | Sequence[str | None] | None, count: int
    ) -> RequestOptions | Sequence[RequestOptions]:
        """Raises UnknownModel."""
        if adapter is None:
            return _WHOLE
        names = [adapter] * count if isinstance(adapter, str) else list(adapter)
        if len(names) != count:
            raise InvalidRequest(f"{count} prompts and {len(names)} adapters", param="adapter")
        return [
            _WHOLE if name is None else RequestOptions(whole=True, adapter=self.adapters.find(name).digest)
            for name in names
        ]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: PoolingKind | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        truncate: bool = False,
    ) -> list[np.ndarray]:
        """A vector, float32, for each prompt, as the model's files say how. A model that draws text, opened with
        `pooling`, gives the final hidden states [hidden_size] of the last token, or as `pooling` says, of length 1.
        Raises InvalidRequest for a model of another task, for a text that is too long and not to be cut, and for a
        number of `dimensions` that the model does not offer.

        Example:
            with LLM("path/to/embedder") as llm:
                first, second = llm.embed(["a cat", "a dog"])
        """
        several = _as_list(prompts)
        if self.served.draws:  # its files do not say what a vector of it is
            kind, length = pooling or "last", True if normalize is None else normalize
            options = RequestOptions(extras=PromptExtras(pooling=Pooling(kind, length)))
            return self._vectors(several, [options] * len(several))
        ask = VectorAsk(
            pooling=pooling, normalize=normalize, dimensions=dimensions, prompt_name=prompt_name, truncate=truncate
        )
        return self._ask(several, ask, "embed")

    def classify(self, texts: Text | Sequence[Text], *, truncate: bool = False) -> list[Classified]:
        """The likeliest label of each text, and the scores of all. A TextPair is read as one text."""
        ask = VectorAsk(truncate=truncate)
        return [classified(self.served, one) for one in self._ask(_as_list(texts), ask, "classify", "score", "reward")]

    def score(self, first: str | Sequence[str], second: str | Sequence[str], *, truncate: bool = False) -> list[float]:
        """How well each second text goes with the first of the same place; one first text goes with all."""
        seconds = [second] if isinstance(second, str) else list(second)
        firsts = [first] * len(seconds) if isinstance(first, str) else list(first)
        if len(firsts) != len(seconds):
            raise InvalidRequest(f"{len(firsts)} first texts and {len(seconds)} second ones", param="second")
        pairs = [TextPair(one, other) for one, other in zip(firsts, seconds, strict=True)]
        vectors = self._ask(pairs, VectorAsk(truncate=truncate), "score")
        return [float(activated(one, self.served.activation)[0]) for one in vectors]

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, truncate: bool = False
    ) -> list[Ranked]:
        """The documents that go best with the query, best first."""
        return ranked(self.score(query, documents, truncate=truncate), top_n)

    def reward(self, texts: Text | Sequence[Text], *, truncate: bool = False) -> list[float]:
        """A reward model's number for each text."""
        return [float(one[0]) for one in self._ask(_as_list(texts), VectorAsk(truncate=truncate), "reward")]

    def _ask(self, texts: Sequence[Any], ask: VectorAsk, *tasks: Task) -> list[np.ndarray]:
        if self.served.task not in tasks:
            raise InvalidRequest(refusal(self.served, tasks[0]))
        check_dimensions(self.served, ask.dimensions)
        found = [self.vectors.prompt(text, ask) for text in texts]
        options = [RequestOptions(extras=each.extras) for each in found]
        normalize = self.served.normalize if ask.normalize is None else ask.normalize
        vectors = self._vectors([each.token_ids for each in found], options)
        return [cut(vector, ask.dimensions, normalize=normalize) for vector in vectors]

    def _vectors(self, prompts: Sequence[Prompt], options: Sequence[RequestOptions]) -> list[np.ndarray]:
        vectors: dict[int, np.ndarray] = {}
        for number, output in self._run(prompts, [SamplingParams()] * len(prompts), options):
            assert output.vector is not None, "a request for a vector ends with one"
            vectors[number] = np.frombuffer(output.vector, dtype=np.float32)
        return [vectors[number] for number in range(len(prompts))]

    def default_sampling(self, **settings: Any) -> SamplingParams:
        """What the model's makers recommend, with `settings` in place of some of it."""
        return SamplingParams(**{**self.sampling_defaults, **settings})

    def chat(self, messages: Conversation, sampling: SamplingParams | None = None) -> RequestOutput:
        """One assistant turn."""
        return self.chat_batch([messages], sampling)[0]

    def chat_batch(
        self, conversations: Sequence[Conversation], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """One assistant turn of each conversation, all at once."""
        return self.generate([self._chat_prompt(messages) for messages in conversations], sampling)

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """One prompt's outputs as they come. Leaving the loop early aborts it."""
        with contextlib.closing(self._run([prompt], [sampling or self.default_sampling()])) as run:
            for _, output in run:
                yield output

    def stream_batch(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """The outputs of several prompts as they come, in the order in which they do; request_id is the prompt's
        index. Leaving the loop early aborts what is unfinished."""
        with contextlib.closing(self._run(prompts, self._each(sampling, len(prompts)))) as run:
            for number, output in run:
                yield dataclasses.replace(output, request_id=str(number))

    def stream_chat(self, messages: Conversation, sampling: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """One assistant turn as it comes."""
        return self.stream(self._chat_prompt(messages), sampling)

    def close(self) -> None:
        """Ends the workers and gives their memory back. Streams that are open end with EngineDead."""
        self._shared.close("closed by its owner")
        self._folder.cleanup()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if not isinstance(sampling, Sequence):
            return [sampling or self.default_sampling()] * count
        if len(sampling) != count:
            raise InvalidRequest(f"{count} prompts and {len(sampling)} SamplingParams", param="sampling")
        return list(sampling)

    def _chat_prompt(self, messages: Conversation) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequest("chat needs the tokenizer, which is off", param="messages")
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        options: RequestOptions | Sequence[RequestOptions] | None = None,
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Outputs as they come, each with its prompt's number. `options` are those of each, or of all."""
        self.inputs.weights_version = self.engine.weights_version
        each = options if isinstance(options, Sequence) else [options] * len(prompts)
        # Every prompt is checked before the first is accepted.
        requests = [
            self.inputs.process("", prompt, sampling, option)
            for prompt, sampling, option in zip(prompts, params, each, strict=True)
        ]
        return self._shared.run(requests)


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | EmbeddedPrompt | TextPair):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [msgspec.convert(list(prompts), list[int])]
    return list(prompts)
