"""A grammar that costs more than it may ends the request that follows it there, and nobody else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from engine_kit import make_request

from anychip.errors import InvalidRequest
from anychip.hub import resolve_folder
from anychip.sampling_params import StructuredOutput
from anychip.structured_output.processor import GrammarCompiler, GrammarProcessor
from anychip.tokenizer.tokenizer import Tokenizer

VOCAB_SIZE = 8192
COSTLY = StructuredOutput("regex", "x((.|\\n)*a(.|\\n){200})|yes")
"""Its lexer needs a state for every set of places where an "a" stood."""


@pytest.fixture
def compiler():
    made = GrammarCompiler(
        (resolve_folder("quickstart") / "tokenizer.json").read_text, vocab_size=VOCAB_SIZE, eos_token_ids=[0]
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def costly() -> list[int]:
    """Tokens that the grammar allows, and that cost too much."""
    tokenizer, rng = Tokenizer.load("quickstart"), random.Random(1)
    (x,), (a,), (b,) = (tokenizer.encode(text, add_special_tokens=False) for text in "xab")
    return [x, *(rng.choice((a, b)) for _ in range(700))]


def processor(compiler: GrammarCompiler, after: Sequence[int] = ()) -> GrammarProcessor:
    (made,) = compiler.submit(COSTLY, count=1, after=after).result()
    return made


def mask_after(grammar: GrammarProcessor, output: list[int], drafted: Sequence[int] = ()) -> np.ndarray:
    request = make_request("a", [5], max_output=1000)
    request.output_token_ids = output
    mask = np.full(VOCAB_SIZE // 32, 0xFFFFFFFF, dtype=np.uint32)
    grammar.allowed(request, drafted, mask)
    return mask


def follow(grammar: GrammarProcessor, tokens: list[int]) -> None:
    for count in range(len(tokens)):
        mask_after(grammar, tokens[:count])


def test_a_grammar_that_cost_too_much_can_be_followed_by_the_next_request(compiler, costly):
    first = mask_after(processor(compiler), [])
    beside = processor(compiler)
    with pytest.raises(InvalidRequest, match="the regex cannot be followed: lexer error: too many states"):
        follow(processor(compiler), costly)
    for later in (beside, processor(compiler)):
        assert (mask_after(later, []) == first).all()
        follow(later, costly[:20])


def test_drafts_that_cost_too_much_do_not_end_their_sequence(compiler, costly):
    expected = mask_after(processor(compiler), costly[:3])
    grammar = processor(compiler)
    for count in range(3, 300):
        mask_after(grammar, costly[:2], costly[2:count])
    assert (mask_after(grammar, costly[:3]) == expected).all()


def test_a_draft_restricts_as_its_tokens_would_also_where_states_are_used_up(compiler, costly):
    expected = mask_after(processor(compiler), costly[:20])
    beside = processor(compiler)
    with pytest.raises(InvalidRequest):
        follow(processor(compiler), costly)
    assert (mask_after(beside, costly[:5], costly[5:20]) == expected).all()


@pytest.mark.parametrize("drafted", [0, 5, 13])
def test_states_are_used_up_before_a_grammar_begins(compiler, costly, drafted):
    """The tokens before its beginning are none of its own; the beginning itself may be drafted."""
    text = [7, 8, 9, *costly[:12]]
    expected = mask_after(processor(compiler), costly[:12])
    beside = processor(compiler, after=[8, 9])
    with pytest.raises(InvalidRequest):
        follow(processor(compiler), costly)
    known = text[: max(0, len(text) - drafted)]
    assert (mask_after(beside, known, text[len(known) :]) == expected).all()
    assert (mask_after(beside, text) == expected).all()
