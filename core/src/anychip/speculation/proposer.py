"""What drafts tokens: the protocol of a proposer, and the choice of one by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from anychip.drafts import Drafter
from anychip.registry.blame import made_by_name


class Proposer(Protocol):
    """Makes a drafter for each sequence. One object serves an engine, from one thread."""

    def begin(self, owner: str) -> Drafter:
        """A drafter for a new sequence. `owner` stands for its tenant and its salt. What sequences of one owner hold
        must not show in another's drafts: how fast an answer comes would tell of it."""
        ...

    def end(self, drafter: Drafter) -> None:
        """The sequence has ended."""
        ...


PROPOSERS = {
    "ngram": "anychip.speculation.text_index:PromptLookup",
    "suffix": "anychip.speculation.text_index:SuffixLookup",
    "auto": "anychip.speculation.text_index:SuffixLookup",
    "draft:MODEL": "anychip.speculation.draft_model:DraftModel",
    "eagle:HEAD": "anychip.speculation.draft_model:DraftModel",
    "medusa:HEADS": "anychip.speculation.draft_model:DraftModel",
    "mtp": "anychip.speculation.draft_model:DraftModel",
}


def make_proposer(name: str, contributed: Mapping[str, str]) -> Proposer:
    """`contributed` maps names to the dotted classes that plugins bring. Raises ConfigError for others."""
    unknown = f"--speculate {name}: no such proposer"
    kind, _, source = name.partition(":")
    known = next((each for each in (*PROPOSERS, *contributed) if source and each.startswith(f"{kind}:")), name)
    proposer: Proposer = made_by_name(known, PROPOSERS, contributed, unknown=unknown)
    return proposer
