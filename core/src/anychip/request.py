"""One sequence as the engine sees it: its tokens, how far it is computed, its transitions.

Does not hold text (engine/output_processor does) or decide anything (scheduler/ does).
"""

from __future__ import annotations

import enum
import math
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from anychip.drafts import Speculation
from anychip.prefix import PLAIN_ROOT, PrefixRoot
from anychip.prompt_extras import PromptExtras
from anychip.sampling_params import SamplingParams
from anychip.step_messages import TokenLogprobs
from anychip.types import BlockId, FinishReason, RequestId, Slot

if TYPE_CHECKING:
    import numpy as np


class LogitsProcessor(Protocol):
    """Restricts the next token of one sequence. Grammars and bad words plug in here. An AnychipError that it raises
    ends the request. `name` is what its user calls it."""

    @property
    def name(self) -> str: ...

    def allowed(self, request: Request, drafted: Sequence[int], mask: np.ndarray) -> None:
        """Clears bits of `mask` for the token behind the request's known ids and `drafted`, which are guesses: what is
        kept of the request must not count them. Where they are forbidden already, the mask does not matter.

        mask: [ceil(vocab_size / 32)] uint32; bit i of word i // 32 set means that token i is allowed.
        """
        ...

    def forced(self, request: Request) -> list[int]:
        """Tokens behind the known ids that leave no choice, one after the other; [] where nobody knows."""
        ...

    def applies(self, position: int) -> bool:
        """Whether the token at `position` is restricted at all; False costs nothing."""
        ...


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


_NEXT = {
    RequestStatus.WAITING: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.RUNNING: {RequestStatus.PREEMPTED, RequestStatus.FINISHED},
    RequestStatus.PREEMPTED: {RequestStatus.RUNNING, RequestStatus.FINISHED},
    RequestStatus.FINISHED: set(),
}


class Request:
    """Counters: `num_known` ids are on the host; `num_promised` more will be sampled by steps in flight;
    `num_computed` tokens have their KV written, or will by steps already launched. The request is behind,
    and wants to be scheduled, while num_computed < num_known + num_promised.

    `epoch` grows whenever steps in flight lose their meaning (preemption, end): a result that was launched
    under another epoch is dropped.
    """

    __slots__ = (
        "adapter", "adapter_slot", "arrival", "arrived_at", "block_hashes", "block_ids", "cached_tokens", "deadline",
        "drawn_in", "enters", "epoch", "extras", "finish_reason", "fork_of", "index", "is_beam", "junction",
        "max_output", "media_marks", "next_change_at", "num_cached_blocks", "num_computed", "num_logprobs",
        "num_promised", "num_prompt", "output_token_ids", "prefix_root", "priority", "processors", "prompt",
        "prompt_logprobs", "rank", "request_id", "sampling", "scheduled_at", "seed", "slot", "speculation", "status",
        "stop_ids", "tenant", "whole",
    )  # fmt: skip

    def __init__(
        self,
        *,
        request_id: RequestId,
        index: int,
        prompt: bytes,
        sampling: SamplingParams,
        max_output: int,
        stop_ids: frozenset[int],
        seed: int,
        arrival: int,
        priority: int = 0,
        prefix_root: PrefixRoot = PLAIN_ROOT,
        media_marks: Mapping[int, bytes] | None = None,
        block_hashes: Sequence[bytes] = (),
        num_logprobs: int = -1,
        fork_of: Request | None = None,
        processors: tuple[LogitsProcessor, ...] = (),
        tenant: str = "",
        arrived_at: float | None = None,
        deadline: float = math.inf,
        whole: bool = False,
        extras: PromptExtras | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.prompt = prompt  # int32 ids, shared by the sequences of a request
        self.num_prompt = len(prompt) // 4
        self.output_token_ids: list[int] = []
        self.sampling = sampling
        self.max_output = max_output
        self.stop_ids = stop_ids
        self.seed = seed
        self.arrival = arrival
        self.priority = priority
        self.prefix_root = prefix_root  # of the tokens that it has computed, or will
        self.adapter = prefix_root.adapter  # None: it has none
        self.adapter_slot = -1  # the device's, while it has a slot; -1: none
        self.media_marks = media_marks or {}  # what the block hashes take beside the tokens, by hash block
        self.fork_of = fork_of  # whose prompt it may share, until it has a slot
        self.processors = processors
        self.tenant = tenant
        self.deadline = deadline  # on the monotonic clock
        self.whole = whole  # its tokens are told of when it ends, and not before
        self.extras = extras
        self.is_beam = sampling.beam_width > 0
        self.num_logprobs = num_logprobs  # how many of the likeliest tokens are reported with each; -1: none

        self.status = RequestStatus.WAITING
        self.epoch = 0
        self.speculation: Speculation | None = None  # None: nothing is drafted for it
        self.slot: Slot | None = None
        self.num_computed = 0
        self.num_promised = 0
        self.drawn_in = 0  # the newest step that draws for it; 0: none since the workers were told all of it
        self.cached_tokens = 0
        self.rank = 0.0  # the policy's
        self.arrived_at = time.monotonic() if arrived_at is None else arrived_at
        self.scheduled_at = self.arrived_at  # until it first is
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's second token and on
        self.enters = False  # the workers are to be told all of it: it has a new slot, or other tokens and blocks
        self.block_ids: list[list[BlockId]] = []  # by KV group; the KV cache manager alone mutates it
        self.next_change_at = 0  # the KV cache manager's: until then the next token has room
        self.junction = 0  # the KV cache manager's: tokens behind which a state is to be kept; 0: none
        self.block_hashes = list(block_hashes)
        self.num_cached_blocks: list[int] = []  # by KV group: leading blocks that are offered, or never will be

    @property
    def num_known(self) -> int:
        return self.num_prompt + len(self.output_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.output_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output, copied: not for what runs every step."""
        prompt = array("i")
        prompt.frombytes(self.prompt)
        return [*prompt, *self.output_token_ids]

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed."""
        return (
            self.sampling.prompt_logprobs is not None
            and self.index == 0
            and len(self.prompt_logprobs) < self.num_prompt - 1
        )

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether it wants to know of tokens that others may have computed: it shares no prefix."""
        return self.scores_prompt or (self.extras is not None and self.extras.needs_whole_prompt)

    @property
    def pools(self) -> bool:
        """Whether it ends with a vector, and draws nothing."""
        return self.extras is not None and self.extras.pooling is not None

    @property
    def num_embedded(self) -> int:
        """Rows of the buffer of embeddings that it takes while it has a slot."""
        return 0 if self.extras is None else self.extras.num_embedded

    def become(self, status: RequestStatus) -> None:
        """Moves along the transition table."""
        assert status in _NEXT[self.status], f"{self.request_id}: {self.status} -> {status}"
        self.status = status

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id}/{self.index} {self.status.name} computed={self.num_computed}"
            f" known={self.num_known}+{self.num_promised})"
        )
