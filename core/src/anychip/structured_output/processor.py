"""A grammar as a restriction on one sequence, and the cache of compiled ones."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from anychip.errors import InvalidRequest
from anychip.request import Request
from anychip.sampling_params import StructuredOutput
from anychip.structured_output.grammar import compiled, refusal

_CACHED = 128

_MOST_AFRESH = 2
"""Times that a sequence may get a matcher of its own: each takes some milliseconds of the engine's thread."""


class GrammarProcessor:
    """request.LogitsProcessor: the tokens that keep a sequence inside its grammar; once it is complete, the end."""

    name = "the grammar"

    def __init__(
        self,
        matcher: LLMatcher,
        wanted: StructuredOutput,
        *,
        after: Sequence[int] = (),
        afresh: Callable[[], LLMatcher],
    ) -> None:
        """`after`: tokens of the output after which the grammar begins; (): at once. `afresh` makes a matcher at its
        beginning that shares nothing with others."""
        self._matcher = matcher
        self._wanted = wanted
        self._afresh = afresh
        self._num_afresh = 0
        self._begun = 0  # of the output: where the grammar begins
        self._seen = 0  # of the output
        self._after = list(after)

    def applies(self, position: int) -> bool:
        return True

    def allowed(self, request: Request, drafted: Sequence[int], mask: np.ndarray) -> None:
        """Raises InvalidRequest when following the grammar costs more than it may."""
        if not self._follow(request):
            within = self._within(request, drafted)
            if within is None:
                return
            drafted = within
        before = mask.copy()
        while True:
            matcher = self._after_draft(drafted, len(mask))
            if matcher is None:
                return  # the grammar forbids one of them
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if not matcher.is_error():
                return
            mask[:] = before
            if not self._start_afresh(request):
                break
        if not drafted:  # what follows a draft may never be drawn, and where it is, its next step ends here
            raise refusal(self._wanted, matcher.get_error())

    def _after_draft(self, drafted: Sequence[int], num_words: int) -> LLMatcher | None:
        """A matcher behind the drafted tokens; one with an error where they cost too much, None where the grammar
        forbids one of them. Masks have `num_words`."""
        if not drafted:
            return self._matcher
        matcher = self._matcher.deep_copy()  # an error is for ever
        if matcher.is_stopped():
            return matcher if matcher.is_error() else None
        count = matcher.validate_tokens(list(drafted))
        matcher.consume_tokens(list(drafted[:count]))
        if count == len(drafted):
            return matcher
        # What costs too much counts as forbidden there. The mask, which needs all that any token needs, tells.
        mask = np.empty(num_words, dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return matcher if matcher.is_error() else None

    def _start_afresh(self, request: Request) -> bool:
        """Matchers of a grammar share the states of their lexer, and the limit on these: other sequences and drafts
        may have used them up. False: this one has had its share."""
        if self._num_afresh >= _MOST_AFRESH:
            return False
        self._num_afresh += 1
        self._matcher = self._afresh()
        has_begun = not self._after
        if has_begun and (known := request.output_token_ids[self._begun : self._seen]):
            self._matcher.consume_tokens(known)
        return True

    def forced(self, request: Request) -> list[int]:
        if not self._follow(request) or self._matcher.is_stopped():
            return []
        found: list[int] = self._matcher.compute_ff_tokens()
        return found

    def _follow(self, request: Request) -> bool:
        """Takes in what is known of the output. False: the grammar has not begun."""
        if self._after and not self._begins(request):
            return False
        new = request.output_token_ids[self._seen :]
        self._seen = request.num_output
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        return True

    def _begins(self, request: Request) -> bool:
        """Every new token is looked at: drafts bring several at once."""
        output, count = request.output_token_ids, len(self._after)
        for end in range(max(self._seen, count), len(output) + 1):
            if output[end - count : end] == self._after:
                self._after, self._begun, self._seen = [], end, end
                return True
        self._seen = len(output) + 1
        return False

    def _within(self, request: Request, drafted: Sequence[int]) -> Sequence[int] | None:
        """The drafted tokens behind the grammar's beginning, where that is among them."""
        text, count = [*request.output_token_ids[-len(self._after) :], *drafted], len(self._after)
        for end in range(len(text) - len(drafted) + 1, len(text) + 1):
            if end >= count and text[end - count : end] == self._after:
                return text[end:]
        return None


class GrammarCompiler:
    """Compiles in a thread of its own, so that nobody's step waits. `tokenizer_json` is called once, when the first
    grammar is wanted."""

    def __init__(self, tokenizer_json: Callable[[], str], *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()
        self._spent: deque[LLMatcher] = deque(maxlen=_CACHED)  # the engine's thread appends to it
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def submit(
        self, wanted: StructuredOutput, *, count: int, after: Sequence[int] = ()
    ) -> Future[list[GrammarProcessor]]:
        """Processors for `count` sequences; or the InvalidRequest that says why there are none."""

        def make() -> list[GrammarProcessor]:
            remembered = self._remembered(wanted)
            afresh = partial(self._compiled_afresh, wanted, remembered)
            return [GrammarProcessor(remembered.deep_copy(), wanted, after=after, afresh=afresh) for _ in range(count)]

        return self._thread.submit(make)

    def matcher(self, wanted: StructuredOutput) -> LLMatcher:
        """One at its beginning, compiled now if it is not remembered. Raises InvalidRequest."""
        return self._remembered(wanted).deep_copy()

    def _remembered(self, wanted: StructuredOutput) -> LLMatcher:
        """What matchers of a grammar are copied from, until what the copies share is used up."""
        with self._lock:
            found = self._cache.get(wanted)
            if found is None or any(found is spent for spent in self._spent):
                found = self._cache[wanted] = compiled(wanted, self._load())
                if len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(wanted)
            return found

    def _compiled_afresh(self, wanted: StructuredOutput, spent: LLMatcher) -> LLMatcher:
        """On the engine's thread, which must not wait for the lock: a compilation may hold it."""
        self._spent.append(spent)
        return compiled(wanted, self._load())

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> LLTokenizer:
        if self._tokenizer is None:
            if not self._eos_token_ids:
                raise InvalidRequest("structured output needs a model with an end-of-sequence token")
            self._tokenizer = LLTokenizer(
                self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        return self._tokenizer
