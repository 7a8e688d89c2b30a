"""What drafts tokens: the protocol of a proposer, and the choice of one by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from anychip.registry.blame import made_by_name


class Draft(NamedTuple):
    """Tokens that may follow, and the number of tokens before them on which the guess rests: the more they are, the
    likelier it holds."""

    token_ids: Sequence[int]
    evidence: int


NO_DRAFT = Draft((), 0)


class Drafter(Protocol):
    """Guesses how one sequence goes on. What it raises, what is no draft, and a call that takes more than a second cost
    its sequence the drafts, and nothing else."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """These tokens follow those before. Called with the prompt first. Cheap: the work is `catch_up`'s."""
        ...

    def catch_up(self, most: int) -> int:
        """Takes in at most `most` of the tokens that it was told of; returns how many it took in."""
        ...

    def draft(self, most: int) -> Draft:
        """What may follow the last token, at most `most` tokens of the vocabulary. Called once all are taken in."""
        ...


class Proposer(Protocol):
    """Makes a drafter for each sequence. One object serves an engine, from one thread."""

    def begin(self, tenant: str) -> Drafter:
        """A drafter for a new sequence. What sequences of one tenant hold must not show in another's drafts: how fast
        an answer comes would tell of it."""
        ...

    def end(self, drafter: Drafter) -> None:
        """The sequence has ended."""
        ...


PROPOSERS = {
    "ngram": "anychip.speculation.text_index:PromptLookup",
    "suffix": "anychip.speculation.text_index:SuffixLookup",
    "auto": "anychip.speculation.text_index:SuffixLookup",
}


def make_proposer(name: str, contributed: Mapping[str, str]) -> Proposer:
    """`contributed` maps names to the dotted classes that plugins bring. Raises ConfigError for others."""
    unknown = f"--speculate {name}: no such proposer"
    proposer: Proposer = made_by_name(name, PROPOSERS, contributed, unknown=unknown)
    return proposer
