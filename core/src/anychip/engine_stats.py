"""How an engine stands: counts of its requests, blocks, drafts and experts, as they cross to who shows them."""

from __future__ import annotations

import msgspec

from anychip.step_messages import ExpertStats


class SpeculationStats(msgspec.Struct, frozen=True, array_like=True):
    """What drafts came to, since the engine's start."""

    drafted: int
    """Tokens that were drafted."""
    accepted_at: tuple[int, ...]
    """By position in a draft: how often the token there was drawn."""
    saved_s: float
    """Seconds that the accepted tokens would have taken in steps of their own, less what all drafts cost; by the costs
    of steps that were measured at the start."""
    failures: int
    """Sequences that went on without drafts because the proposer failed."""

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)


class LaneStats(msgspec.Struct, frozen=True, array_like=True):
    """How one of several data-parallel lanes stands."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks: int


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """How the engine stands. What counts events counts them since its start."""

    running: int
    waiting: int
    waiting_tokens: int
    """Tokens of the prompts that wait."""
    kv_blocks_used: int
    kv_blocks: int
    steps: int
    preemptions: int
    prefix_queries: int
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens that the prefix cache held."""
    speculation: SpeculationStats | None = None
    """None: nothing is drafted."""
    weights_version: int = 0
    """How often the weights have changed in place."""
    experts: ExpertStats | None = None
    """None: no experts move, or nobody has looked yet."""
    lanes: tuple[LaneStats, ...] = ()
    """(): there is one."""
    states_used: int = 0
    states: int = 0
    """Blocks of the states' pool, of sequences and of the prefix cache; 0: the model keeps no states."""
