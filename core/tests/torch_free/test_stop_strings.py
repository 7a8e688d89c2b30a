"""Stop strings in text that comes in pieces, beside a reference that has the whole text."""

from __future__ import annotations

from array import array

from hypothesis import example, given, settings
from hypothesis import strategies as st

from anychip.engine.output_processor import OutputProcessor, merge
from anychip.engine.stop_strings import StopStrings
from anychip.messages import AddRequest, SequenceDelta
from anychip.sampling_params import SamplingParams
from anychip.step_messages import TokenLogprobs
from anychip.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load("quickstart")
FEW = st.text("ab ", min_size=1, max_size=4)  # so that stop strings occur, overlap and contain one another


def reference(pieces: list[str], stops: list[str], include_stop: bool, first_counting: int) -> tuple[str, str | None]:
    """The text, and the stop string that ends it. Only what ends in a piece from `first_counting` on counts."""
    whole, uncounted = "".join(pieces), len("".join(pieces[:first_counting]))
    for end in range(uncounted + 1, len(whole) + 1):
        for stop in stops:
            if whole[:end].endswith(stop):
                return whole[: end if include_stop else end - len(stop)], stop
    return whole, None


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.text("ab ", max_size=5), max_size=12), stops=st.lists(FEW, min_size=1, max_size=4),
    include_stop=st.booleans(), first_counting=st.integers(0, 6),
)  # fmt: skip
@example(pieces=["a", "b", "a"], stops=["aba", "b"], include_stop=False, first_counting=2)
def test_pieces_end_where_the_whole_text_does(pieces, stops, include_stop, first_counting):
    search, given_out = StopStrings(stops, include_stop=include_stop), ""
    for number, piece in enumerate(pieces):
        given_out += search.add(piece, may_stop=number >= first_counting)
        if search.found is not None:
            break
        assert len("".join(pieces[: number + 1])) - len(given_out) < max(map(len, stops))
    if search.found is None:
        given_out += search.rest()
    assert (given_out, search.found) == reference(pieces, stops, include_stop, first_counting)


@settings(max_examples=80, deadline=None)
@given(
    text=st.text("ab c", min_size=1, max_size=30), stops=st.lists(FEW, max_size=3), min_tokens=st.integers(0, 8),
    include_stop=st.booleans(), cuts=st.lists(st.integers(1, 5), max_size=30),
)  # fmt: skip
def test_an_answer_does_not_depend_on_how_many_tokens_come_at_once(text, stops, min_tokens, include_stop, cuts):
    ids = TOKENIZER.encode(text)
    sampling = SamplingParams(
        stop=tuple(stops), min_tokens=min_tokens, include_stop_str_in_output=include_stop, logprobs=0
    )

    def whole_of(sizes: list[int]):
        processor, pieces, at = OutputProcessor(TOKENIZER), [], 0
        processor.add(AddRequest("r", array("i", [5]).tobytes(), sampling, len(ids), ()))
        for size in [*sizes, len(ids)]:
            now = ids[at : at + size]
            at += len(now)
            entries = [TokenLogprobs(float(token), [], []) for token in now]
            end = "length" if at == len(ids) else None
            output, told = processor.process(SequenceDelta("r", 0, now, finish_reason=end, logprobs=entries))
            pieces.append(output)
            if output.finished:
                assert told == (end is None)
                break
        assert not processor._requests
        return merge(pieces).outputs[0]

    one_by_one = whole_of([1] * len(ids))
    assert whole_of(cuts) == one_by_one
    assert [entry.chosen for entry in one_by_one.logprobs] == one_by_one.token_ids
    texts, before = [], TOKENIZER.decode([5])
    for number in range(1, len(ids) + 1):
        now = TOKENIZER.decode([5, *ids[:number]])
        texts.append(now[len(before) :])
        before = now
    assert (one_by_one.text, one_by_one.stop_reason) == reference(texts, stops, include_stop, max(0, min_tokens - 1))
