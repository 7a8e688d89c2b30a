"""What a step does to block tables and blocks, as the workers must know it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class BlockChanges:
    """Changes of the block tables that the workers must know, collected until the step is sent."""

    new_blocks: list[int] = field(default_factory=list)
    """Entries of the block tables, four numbers each: slot, group, index in the table, block id. Flat, so that one pass
    encodes them as int32 [num_changes, 4]."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Block ids (source, destination) of the tokens' pool, in the order of copying."""
    state_copies: list[tuple[int, int]] = field(default_factory=list)
    """The same of the states' pool."""
    fresh: list[int] = field(default_factory=list)
    """Ids of the blocks of tokens handed out, for devices that must zero them. A state's block needs none of that: what
    it holds counts for nothing before a sequence's first token."""
