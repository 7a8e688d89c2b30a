"""One step between the engine and its workers: what is decided, what is known late, and what came of it.

Index arrays travel as little-endian int32 bytes: one pass each way, however many rows run.
"""

from __future__ import annotations

import msgspec

from anychip.prompt_extras import PromptExtras


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the chosen token, and of the most likely ones in descending order."""

    chosen: float
    top_ids: list[int]
    top: list[float]


class ExpertStats(msgspec.Struct, frozen=True, array_like=True):
    """How the experts of a model that is spread over ranks are loaded, at the newest look."""

    imbalance: float
    """The busiest rank's routed tokens over the mean of all ranks, averaged over layers. 1 is even."""
    planned: float
    """The same, with the same load, once the moves that were decided on are done."""
    moved: int
    """Slots that got another expert, since the start."""


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A request entering a slot: everything a worker will ever need of it, told once.

    `token_ids` are int32 bytes: the prompt, and after a preemption the output so far. The defaults are those of a
    greedy request that asks for nothing else.
    """

    slot: int
    token_ids: bytes
    num_prompt: int
    num_computed: int
    block_ids: list[list[int]]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    logprobs: int = -1
    """-1: none; otherwise how many of the most likely tokens to report."""
    score_from: int = 2**31 - 1
    """First position whose next prompt token is to be scored; beyond the prompt: none."""
    score_top: int = 0
    """How many of the most likely tokens to report with a score."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    """By token id. The workers count the row's tokens themselves."""
    extras: PromptExtras | None = None
    adapter_slot: int = -1
    """The device's slot of the row's adapter; -1: it has none."""


class AdapterSlot(msgspec.Struct, frozen=True, array_like=True):
    """From this step on, the device's slot holds the adapter of this digest."""

    slot: int
    digest: bytes


class StepDecision(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One step for the workers, as a delta to the state they keep.

    `slots` and `num_tokens` are int32 bytes [num_rows]. `new_blocks` are int32 bytes [k, 4]: slot, group,
    index in the row's table, block id. A row samples when this step computes its last known token.
    `num_drafts` int32 bytes [num_rows] (b"": none has any) says how many of a row's tokens are guesses, which stand
    behind its last known one, and `drafts` has their ids, row after row. Such a row samples behind each of them too.
    `rewinds` are int32 bytes [k, 2]: a slot, and how many of its tokens are computed after all, because what it
    computed beyond was drafted and not drawn; it is told before the slot's next step.
    `num_proposed` int32 bytes [num_rows] (b"": nothing) says how many tokens the workers' draft model is to draft
    behind what the row draws; the row has blocks for them.
    `adapters` are those that slots of the device get with this step.
    Without rows it says nothing but its id: the rank joins in what the step's other ranks do.
    Order of effects: finished, new rows, rewinds, new blocks, copies, zeros, adapters, forward.
    """

    step_id: int
    slots: bytes
    num_tokens: bytes
    new_rows: list[NewRow]
    new_blocks: bytes
    finished_slots: list[int]
    copies: list[tuple[int, int]]
    zeros: list[int]
    num_drafts: bytes = b""
    drafts: bytes = b""
    rewinds: bytes = b""
    num_proposed: bytes = b""
    adapters: list[AdapterSlot] = []
    state_copies: list[tuple[int, int]] = []
    """As `copies`, of blocks of the states' pool."""
    ids_behind: int = 0
    """How many steps before this one the newest was launched whose drawn ids this one computes; 0: it computes none.
    Without a pipeline the workers have every earlier step's, and nobody says."""


class LateInputs(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What sampling needs that was not known when the step was launched, by position among its samples.

    A mask is a packed bitmask of allowed tokens: bit i of word i // 32, little-endian.
    """

    step_id: int
    masks: dict[int, bytes]


class StepResult(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`token_ids` are int32 bytes: what the sampling rows gained, in the order of the decision's rows. `num_gained` are
    int32 bytes [sampling rows]: how many ids each gained; b"": one each."""

    step_id: int
    token_ids: bytes
    logprobs: dict[int, TokenLogprobs]
    """By position in `token_ids`; only of rows that asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    """By position among the decision's rows: of the prompt tokens that follow those computed, in order."""
    num_gained: bytes = b""
    vectors: dict[int, bytes] = {}
    """By position among the decision's rows: float32 [hidden_size], of rows whose prompt was computed and that ask for
    a vector. Such rows sample nothing."""
    proposed: bytes = b""
    """What the draft model drafted: int32 [sum of num_proposed]; -1 where it has not caught up with a row."""
    experts: ExpertStats | None = None
    """After a look at the experts' load, and while some move."""
    lane: int = 0
    """Whose requests they are."""


class LaneDecisions(msgspec.Struct, frozen=True):
    """One step of data-parallel lanes: what the workers of each are told. None: they have no part in the step. The
    executor takes it apart, and so it does with the two below."""

    step_id: int
    lanes: list[StepDecision | None]

    @property
    def num_tokens(self) -> bytes:
        """As a decision's, of all lanes' rows."""
        return b"".join(each.num_tokens for each in self.lanes if each is not None)


class LaneInputs(msgspec.Struct, frozen=True):
    """Late inputs by lane, for those that have a part in the step."""

    step_id: int
    lanes: list[LateInputs | None]


class LaneResults(msgspec.Struct, frozen=True):
    """Results by lane, of those that had a part in the step."""

    step_id: int
    lanes: list[StepResult | None]

    @property
    def experts(self) -> ExpertStats | None:
        """All lanes' workers say the same."""
        return next((each.experts for each in self.lanes if each is not None), None)


AnyDecision = StepDecision | LaneDecisions
AnyInputs = LateInputs | LaneInputs
AnyResult = StepResult | LaneResults
"""Of an engine without lanes, or with lanes."""
