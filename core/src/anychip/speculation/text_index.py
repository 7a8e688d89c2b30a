"""Drafts from what was said before: the longest run of last tokens that stood somewhere already, and what followed.

An index chains the places where the same three tokens stand, newest first. Of the newest few, the place that agrees
with most of the tokens before wins. That finds what a suffix automaton finds, short of matches far down a chain, for a
tenth of the memory and time (docs/decisions/0034-drafts-by-hash-chains.md).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from anychip.drafts import NO_DRAFT, Draft, Drafter

_KEY = 3
"""Tokens that places are looked up by, and the shortest match."""

_LONGEST = 32
"""Tokens of a match that are compared."""

_BITS = 21
"""Of a token id in a key."""


class Match(NamedTuple):
    """`length` tokens before `end` are the text's last ones."""

    length: int
    end: int


NO_MATCH = Match(0, 0)


class TextIndex:
    """A growing text, and where each three of its tokens stood last."""

    def __init__(self) -> None:
        self.token_ids = array("i")
        self._last: dict[int, int] = {}  # by key: the end of its last place
        self._before = array("i")  # by end of a place: the end of the one before; 0: none

    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes tokens in, in time that grows with them alone."""
        text, last, before = self.token_ids, self._last, self._before
        for token in token_ids:
            text.append(token)
            end = len(text)
            if end < _KEY:
                before.append(0)
                continue
            key = _key(text[-3], text[-2], token)
            before.append(last.get(key, 0))
            last[key] = end

    def find(self, tail: Sequence[int], *, most_places: int) -> Match:
        """The longest match of another text's last tokens, the newest among equals."""
        if len(tail) < _KEY:
            return NO_MATCH
        end = self._last.get(_key(tail[-3], tail[-2], tail[-1]), 0)
        return self._best(end, tail, most_places) if end else NO_MATCH

    def find_own(self, *, most_places: int) -> Match:
        """The longest match of this text's own last tokens before its end."""
        before = self._before
        return self._best(before[-1], self.token_ids, most_places) if before and before[-1] else NO_MATCH

    def _best(self, end: int, tail: Sequence[int], most_places: int) -> Match:
        best = NO_MATCH
        while end and most_places:
            length = self._length(end, tail)
            if length > best.length:
                best = Match(length, end)
                if length == _LONGEST:
                    break
            end, most_places = self._before[end - 1], most_places - 1
        return best

    def _length(self, end: int, tail: Sequence[int]) -> int:
        """Of the match that ends there; the last three agree."""
        text, size = self.token_ids, len(tail)
        length, most = _KEY, min(_LONGEST, end, size)
        while length < most and text[end - 1 - length] == tail[size - 1 - length]:
            length += 1
        return length

    def continued(self, end: int, most: int) -> list[int]:
        """The tokens from `end` on; where the text ends, it goes on as it did from `end`, as a loop does."""
        text = self.token_ids
        found = text[end : end + most].tolist()
        period = len(text) - end
        while period > 0 and len(found) < most:
            found.append(found[len(found) - period])
        return found


def _key(first: int, second: int, third: int) -> int:
    return (first << 2 * _BITS) | (second << _BITS) | third


class OwnText:
    """Drafter over one sequence's prompt and output."""

    def __init__(self, *, most_places: int) -> None:
        self.index = TextIndex()
        self._most_places = most_places
        self._told = array("i")
        self._taken = 0  # of `_told`

    def extend(self, token_ids: Sequence[int]) -> None:
        self._told.extend(token_ids)

    def catch_up(self, most: int) -> int:
        new = self._told[self._taken : self._taken + most]
        self.index.extend(new)
        self._taken += len(new)
        if self._taken == len(self._told) and self._taken:
            self._told, self._taken = array("i"), 0
        return len(new)

    def draft(self, most: int) -> Draft:
        match = self.index.find_own(most_places=self._most_places)
        return Draft(self.index.continued(match.end, most), match.length) if match.length else NO_DRAFT


class PromptLookup:
    """Proposer "ngram": what followed the last three tokens when they last stood in the same sequence."""

    def begin(self, owner: str) -> Drafter:
        return OwnText(most_places=1)

    def end(self, drafter: Drafter) -> None:
        """Nothing is kept."""


_PLACES = 8
"""Places of a chain that are compared."""

_EARLIER_TOKENS = 65_536
"""Of an owner's earlier outputs, in each of two generations: the older is dropped when the newer is full."""

_OWNERS = 64
"""Owners whose earlier outputs are kept, those served last."""

_GAP = (1 << _BITS) - 1
"""Stands between outputs: no token id is so large, so no match reaches over it."""


class EarlierOutputs:
    """What one owner's sequences said."""

    def __init__(self) -> None:
        self.newer, self.older = TextIndex(), TextIndex()

    def add(self, output: Sequence[int]) -> None:
        if len(self.newer.token_ids) + len(output) > _EARLIER_TOKENS:
            self.newer, self.older = TextIndex(), self.newer
        self.newer.extend(output[:_EARLIER_TOKENS])
        self.newer.extend([_GAP])

    def draft(self, tail: Sequence[int], most: int) -> Draft:
        match, index = self.newer.find(tail, most_places=_PLACES), self.newer
        older = self.older.find(tail, most_places=_PLACES)
        if older.length > match.length:
            match, index = older, self.older
        if not match.length:
            return NO_DRAFT
        follows = index.token_ids[match.end : match.end + most].tolist()
        ids = follows[: follows.index(_GAP)] if _GAP in follows else follows
        return Draft(ids, match.length) if ids else NO_DRAFT


class SuffixText(OwnText):
    """Drafter over one sequence, and over what the same owner's sequences said before."""

    def __init__(self, earlier: EarlierOutputs) -> None:
        super().__init__(most_places=_PLACES)
        self.earlier = earlier
        self._num_prompt: int | None = None

    def extend(self, token_ids: Sequence[int]) -> None:
        if self._num_prompt is None:
            self._num_prompt = len(token_ids)
        super().extend(token_ids)

    @property
    def output(self) -> Sequence[int]:
        """What followed the prompt, as far as it is taken in."""
        return self.index.token_ids[self._num_prompt or 0 :]

    def draft(self, most: int) -> Draft:
        own = super().draft(most)
        if own.evidence >= _LONGEST:
            return own
        earlier = self.earlier.draft(self.index.token_ids, most)
        return earlier if earlier.evidence > own.evidence else own


class SuffixLookup:
    """Proposer "suffix": what followed the longest run of last tokens that stood in the same sequence before, or in
    what the same owner's sequences said."""

    def __init__(self) -> None:
        self._earlier: OrderedDict[str, EarlierOutputs] = OrderedDict()

    def begin(self, owner: str) -> Drafter:
        earlier = self._earlier.setdefault(owner, EarlierOutputs())
        self._earlier.move_to_end(owner)
        if len(self._earlier) > _OWNERS:
            self._earlier.popitem(last=False)
        return SuffixText(earlier)

    def end(self, drafter: Drafter) -> None:
        assert isinstance(drafter, SuffixText)
        drafter.earlier.add(drafter.output)
