"""Stop strings across tokens, text that is held back, and characters that never become whole."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.engine.output_processor import OutputProcessor, merge
from anychip.messages import AddRequest, SequenceDelta
from anychip.sampling_params import SamplingParams
from anychip.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load("quickstart")
LAST = "length"


def deliver(ids: list[int], **sampling):
    """All pieces of one request whose tokens arrive one by one; and whether the engine had to be told."""
    processor = OutputProcessor(TOKENIZER)
    processor.add(AddRequest("r", array("i", [5]).tobytes(), SamplingParams(**sampling), len(ids), ()))
    pieces, told = [], False
    for number, token in enumerate(ids):
        end = LAST if number == len(ids) - 1 else None
        output, ended_here = processor.process(SequenceDelta("r", 0, [token], finish_reason=end))
        told |= ended_here
        if output is not None:
            pieces.append(output)
    return pieces, told


def text_of(pieces) -> str:
    return merge(pieces).outputs[0].text


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
def test_pieces_add_up_to_the_whole_text(text):
    ids = TOKENIZER.encode(text)
    pieces, _ = deliver(ids)
    assert text_of(pieces) == TOKENIZER.decode([5, *ids])[len(TOKENIZER.decode([5])) :]


@pytest.mark.parametrize("stop", ["return", "n:\n", "ib(n", " "])
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_split(stop):
    text = "def fib(n):\n    return n"
    pieces, told = deliver(TOKENIZER.encode(text), stop=(stop,))
    whole = merge(pieces).outputs[0]
    expected = text[: text.index(stop)] if stop in text else text
    assert whole.text == expected
    if stop in text:
        assert whole.finish_reason == "stop"
        assert whole.stop_reason == stop
        assert told


def test_no_piece_ever_shows_a_part_of_a_stop_string():
    pieces, _ = deliver(TOKENIZER.encode("one two three END four"), stop=("END",))
    assert "E" not in "".join(piece.outputs[0].text for piece in pieces)


def test_stop_strings_do_not_count_before_min_tokens():
    ids = TOKENIZER.encode("a b c d e f g h")
    pieces, _ = deliver(ids, stop=("b",), min_tokens=len(ids))
    assert "c" in text_of(pieces)


def test_bytes_that_never_become_a_character_show_as_a_replacement():
    euro = TOKENIZER.encode("\u20ac")
    assert len(euro) > 1, "the character is several tokens"
    pieces, _ = deliver(euro[:-1])
    assert text_of(pieces).strip("\ufffd") == ""
    assert text_of(pieces)


def test_the_token_that_stopped_a_sequence_is_not_shown():
    processor = OutputProcessor(TOKENIZER)
    (stop,) = TOKENIZER.encode("a")[:1]
    processor.add(AddRequest("r", array("i", [5]).tobytes(), SamplingParams(), 9, (stop,)))
    output, _ = processor.process(SequenceDelta("r", 0, [stop], finish_reason="stop"))
    assert output.outputs[0].text == ""
    assert output.finished


def test_deltas_of_a_finished_or_unknown_request_are_ignored():
    processor = OutputProcessor(TOKENIZER)
    assert processor.process(SequenceDelta("gone", 0, [5])) == (None, False)
