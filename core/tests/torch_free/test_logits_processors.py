"""Restrictions of the next token against their plain definitions, token by token."""

from __future__ import annotations

from array import array

import msgspec
import numpy as np
import pytest
from engine_kit import VOCAB_SIZE, add_message, make_core, make_request, make_scheduler

from anychip.engine.logits_processors import make_processors
from anychip.errors import InvalidRequest
from anychip.messages import AddRequest
from anychip.sampling_params import SamplingParams


def allowed_tokens(sampling: SamplingParams, output: list[int], *, drafted=(), bad=(), stop_ids=(2,)) -> set[int]:
    request = make_request("a", [5, 6])
    request.output_token_ids += output
    message = AddRequest("a", array("i", [5, 6]).tobytes(), sampling, 8, stop_ids, bad_token_ids=bad)
    mask = np.full(-(-VOCAB_SIZE // 32), 0xFFFFFFFF, dtype=np.uint32)
    for processor in make_processors(message, VOCAB_SIZE):
        if processor.applies(request.num_known + len(drafted)):
            processor.allowed(request, drafted, mask)
    return {token for token in range(VOCAB_SIZE) if mask[token // 32] >> np.uint32(token % 32) & np.uint32(1)}


def test_only_allowed_tokens_are_allowed():
    assert allowed_tokens(SamplingParams(allowed_token_ids=(3, 64, 999)), []) == {3, 64, 999}


@pytest.mark.parametrize(
    ("output", "forbidden"), [([], {9}), ([7], {8, 9}), ([7, 8], {9, 10}), ([8], {9}), ([7, 8, 7], {8, 9})]
)
def test_a_bad_word_is_never_completed(output, forbidden):
    found = allowed_tokens(SamplingParams(), output, bad=((9,), (7, 8), (7, 8, 10)))
    assert set(range(VOCAB_SIZE)) - found == forbidden


@pytest.mark.parametrize("split", range(4))
def test_drafted_tokens_restrict_as_if_they_were_drawn(split):
    output, bad = [7, 8, 7], ((9,), (7, 8), (8, 7, 10))
    sampling = SamplingParams(min_tokens=3, max_tokens=9)
    drawn = allowed_tokens(sampling, output, bad=bad)
    assert allowed_tokens(sampling, output[:split], drafted=output[split:], bad=bad) == drawn


def test_a_prompt_that_ends_in_a_bad_words_beginning_does_not_count():
    assert 9 in allowed_tokens(SamplingParams(), [], bad=((6, 9),))


def test_a_restriction_that_leaves_nothing_gives_way():
    core = make_core(make_scheduler())
    core.add(add_message("a", [5, 6], max_output=1, allowed_token_ids=(2,), min_tokens=1))
    core.step()
    (mask,) = core.executor.late[0].masks.values()
    words = np.frombuffer(mask, np.uint32)
    assert words[0] == 1 << 2 and not words[1:].any()


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"bad_words": ("",)}, "bad_words"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"beam_width": 11}, "beam_width"),
        ({"beam_width": 2, "n": 3}, "n"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, param):
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**values)
    assert refused.value.param == param


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 1000])
def test_a_first_restriction_that_leaves_nothing_ends_the_request(vocab_size):
    """Also where the mask's last word has bits beyond the vocabulary."""
    core = make_core(make_scheduler())
    core.vocab_size = core.admission.vocab_size = vocab_size
    message = add_message("a", [5, 6])
    core.add(msgspec.structs.replace(message, bad_token_ids=tuple((token,) for token in range(vocab_size))))
    deltas = core.step() + core.step()
    assert [delta.error for delta in deltas if delta.error] == [
        ("InvalidRequest", f"bad_words leaves none of the {vocab_size} tokens after 0 tokens of output")
    ]
    core.drain()
    assert core.scheduler.kv.pool.num_free == core.scheduler.kv.pool.num_usable


def test_bad_words_give_way_to_a_grammar_that_leaves_nothing_else():
    class OnlyNine:
        name = "the grammar"

        def applies(self, position):
            return True

        def allowed(self, request, drafted, mask):
            mask[:] = 0
            mask[0] = 1 << 9

    core = make_core(make_scheduler())
    core.add(msgspec.structs.replace(add_message("a", [5, 6], max_output=1), bad_token_ids=((9,),)))
    (request,) = core.scheduler.sequences("a")
    request.processors = (OnlyNine(), *request.processors)
    core.step()
    words = np.frombuffer(core.executor.late[0].masks[0], np.uint32)
    assert words[0] == 1 << 9 and not words[1:].any()
