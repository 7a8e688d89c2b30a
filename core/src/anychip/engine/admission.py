"""Which requests the engine accepts, and when they enter the scheduler. Owns those whose grammars are being compiled,
and everybody's deadlines. Does not run anything: engine_core does."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence

from anychip.engine.adapters import EngineAdapters
from anychip.engine.extras import NO_EXTRAS, ServedExtras, check_extras
from anychip.engine.grammars import PendingGrammars
from anychip.engine.logits_processors import make_processors
from anychip.engine.token_ids import check_token_ids
from anychip.errors import AnychipError, InvalidRequest, QueueFull, RequestTimeout
from anychip.kv_cache.hashing import HASH_BYTES, media_marks
from anychip.kv_cache.kinds import blocks_per_request
from anychip.messages import AddRequest
from anychip.prefix import PrefixRoot, check_prefix
from anychip.request import LogitsProcessor, Request
from anychip.scheduler.beam_search import num_candidates
from anychip.scheduler.protocol import StepScheduler
from anychip.types import MAX_LOGPROBS, RequestId

_DEADLINES_EVERY_S = 0.1

Refused = tuple[RequestId, AnychipError]


class Admission:
    """`seed` makes the seeds of requests that bring none reproducible. `grammars` None: no structured output.
    `adapters` None: a request's is believed to be there. `clock` counts seconds from any moment."""

    def __init__(
        self,
        scheduler: StepScheduler,
        *,
        vocab_size: int,
        max_waiting: int,
        max_waiting_tokens: int,
        seed: int,
        grammars: PendingGrammars | None = None,
        served: ServedExtras = NO_EXTRAS,
        adapters: EngineAdapters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.max_waiting = max_waiting
        self.max_waiting_tokens = max_waiting_tokens
        self.grammars = grammars
        self.served = served
        self.adapters = adapters
        self._clock = clock
        self._seeds = random.Random(seed)
        self._arrivals = 0
        self._next_look = -math.inf  # at deadlines

    @property
    def num_pending(self) -> int:
        """Requests whose grammars are being compiled."""
        return 0 if self.grammars is None else len(self.grammars)

    @property
    def pending_adapters(self) -> Iterable[bytes | None]:
        """Of requests that have not entered the scheduler."""
        return () if self.grammars is None else [message.adapter for message, _ in self.grammars.waiting]

    def add(self, message: AddRequest) -> None:
        """Accepts a request of `n` sequences. Raises UserError, with nothing kept, when it cannot be. One that asks
        for structured output enters once its grammar is compiled."""
        self._check(message)
        wanted = message.sampling.structured
        if wanted is None:
            self._enter(message, (), self._clock())
        elif self.grammars is None:
            raise InvalidRequest("structured output needs the tokenizer, which is off", param=wanted.kind)
        else:
            self.grammars.submit(message, wanted, self._clock())

    def cancel(self, request_id: RequestId) -> bool:
        """Forgets a request that has not entered. Returns whether there was one."""
        return self.grammars is not None and self.grammars.cancel(request_id)

    def enter_compiled(self, *, wait: bool) -> list[Refused]:
        """Requests whose grammars are ready enter; `wait` waits a moment for one. Returns those whose grammars
        failed."""
        refused: list[Refused] = []
        for found in self.grammars.ready(wait=wait) if self.grammars else ():
            if found.error is not None:
                refused.append((RequestId(found.message.request_id), found.error))
            else:
                self._enter(found.message, found.grammars, found.arrived_at)
        return refused

    def late(self) -> list[Refused]:
        """Requests that are past their deadlines, looked for every so often."""
        now = self._clock()
        if now < self._next_look:
            return []
        self._next_look = now + _DEADLINES_EVERY_S
        late = [
            request_id
            for request_id, sequences in self.scheduler.requests.items()
            if any(request.deadline < now for request in sequences.values())
        ]
        for message, arrived_at in () if self.grammars is None else self.grammars.waiting:
            if _deadline(message, arrived_at) < now:
                late.append(RequestId(message.request_id))
        return [(one, RequestTimeout("the request did not end within its deadline")) for one in late]

    def close(self) -> None:
        if self.grammars is not None:
            self.grammars.close()

    def _check(self, message: AddRequest) -> None:
        request_id, num_prompt = RequestId(message.request_id), message.num_prompt
        if request_id in self.scheduler.requests or (self.grammars is not None and request_id in self.grammars):
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        waiting = len(self.scheduler.waiting) + self.num_pending
        if waiting + message.sampling.num_sequences > self.max_waiting:
            raise QueueFull(f"{waiting} requests wait, at most {self.max_waiting} may; try again later")
        waiting_tokens = self.scheduler.waiting.num_tokens
        if waiting and waiting_tokens + num_prompt > self.max_waiting_tokens:
            raise QueueFull(
                f"prompts of {waiting_tokens} tokens wait, at most {self.max_waiting_tokens} may; try again later"
            )
        check_token_ids(message.prompt, self.vocab_size)
        check_prefix(message.adapter, message.media, num_prompt)
        if message.adapter is not None and self.adapters is not None:
            self.adapters.check(message.adapter)
        if message.extras is not None:
            check_extras(message, message.extras, self.served)
        self._check_blocks(message)
        if message.sampling.beam_width:
            self._check_beams(message)

    def _check_blocks(self, message: AddRequest) -> None:
        """A request that does not fit the cache alone would wait for ever."""
        width, kv = message.sampling.beam_width, self.scheduler.kv
        pools = message.extras is not None and message.extras.pooling is not None
        length = message.num_prompt + (0 if pools else message.max_output)
        blocks = max(1, width) * blocks_per_request(kv.groups, length, self.scheduler.max_tokens)
        if blocks > kv.pool.num_usable:
            raise InvalidRequest(
                f"{width} beams of {length} tokens may take {blocks} KV blocks, there are {kv.pool.num_usable}; "
                "lower max_tokens or the number of beams"
                if width
                else f"{length} tokens take {blocks} KV blocks, there are {kv.pool.num_usable}; lower max_tokens",
                param="beam_width" if width else "max_tokens",
            )

    def _check_beams(self, message: AddRequest) -> None:
        width = message.sampling.beam_width
        if not self.scheduler.kv.shares:
            raise InvalidRequest(
                "beams share what they have computed, and the states of this model's layers cannot be shared; "
                "ask for n sequences instead",
                param="beam_width",
            )
        if width > self.scheduler.max_rows:
            raise InvalidRequest(f"{width} beams; at most {self.scheduler.max_rows} sequences run", param="beam_width")
        if num_candidates(width, len(set(message.stop_ids))) > MAX_LOGPROBS:
            raise InvalidRequest(
                f"{len(message.stop_ids)} stop tokens and {width} beams are {MAX_LOGPROBS} together at most",
                param="stop_token_ids",
            )

    def _enter(self, message: AddRequest, grammars: Sequence[LogitsProcessor], arrived_at: float) -> None:
        """`grammars` has one for each sequence, or none at all."""
        sampling, stop_ids = message.sampling, frozenset(message.stop_ids)
        seed = self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        kv = self.scheduler.kv
        root = PrefixRoot(adapter=message.adapter, weights_version=kv.weights_version, salt=message.cache_salt)
        made = message.block_hashes if message.weights_version == kv.weights_version else b""
        hashes = [made[at : at + HASH_BYTES] for at in range(0, len(made), HASH_BYTES)]
        marks = media_marks(message.media, kv.hash_block_size)
        sequences: list[Request] = []
        for index in range(sampling.num_sequences):
            self._arrivals += 1
            request = Request(
                request_id=RequestId(message.request_id),
                index=index,
                prompt=message.prompt,
                sampling=sampling,
                max_output=message.max_output,
                stop_ids=stop_ids,
                seed=seed,
                arrival=self._arrivals,
                priority=message.priority,
                prefix_root=root,
                media_marks=marks,
                block_hashes=hashes,
                num_logprobs=_num_logprobs(message),
                fork_of=sequences[0] if sequences else None,
                processors=make_processors(message, self.vocab_size, grammars[index : index + 1]),
                tenant=message.tenant,
                arrived_at=arrived_at,
                deadline=_deadline(message, arrived_at),
                whole=message.whole,
                extras=message.extras,
            )
            sequences.append(request)
        self.scheduler.add(*sequences)


def _deadline(message: AddRequest, arrived_at: float) -> float:
    return math.inf if message.deadline is None else arrived_at + message.deadline


def _num_logprobs(message: AddRequest) -> int:
    """How many of the likeliest tokens the workers report; -1: none."""
    sampling = message.sampling
    if sampling.beam_width:
        return num_candidates(sampling.beam_width, len(set(message.stop_ids)))
    return -1 if sampling.logprobs is None else sampling.logprobs
