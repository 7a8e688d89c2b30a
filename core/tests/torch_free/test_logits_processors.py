"""Penalties, biases and restrictions against their plain definitions, token by token."""

from __future__ import annotations

from array import array
from collections import Counter

import msgspec
import numpy as np
import pytest
from engine_kit import TOKEN, VOCAB_SIZE, add_message, make_core, make_request, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.engine.logits_processors import LogitEditor, make_processors
from anychip.errors import InvalidRequest
from anychip.messages import AddRequest
from anychip.sampling_params import SamplingParams

tokens = st.integers(0, 40)


def edited(logits: np.ndarray, edits) -> np.ndarray:
    """The op's definition."""
    out = logits.astype(np.float64).copy()
    if edits is not None:
        ids = np.frombuffer(edits.ids, np.int32)
        scales, shifts = np.frombuffer(edits.scales, np.float32), np.frombuffer(edits.shifts, np.float32)
        assert len(set(ids.tolist())) == len(ids), "an id stands in the edits twice"
        out[ids] = np.where(out[ids] > 0, out[ids] / scales, out[ids] * scales) + shifts
    return out


def penalized(logits: np.ndarray, sampling: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """The reference: penalties as their users know them."""
    out, counts = logits.astype(np.float64).copy(), Counter(output)
    for token in set(prompt) | set(output):
        repetition = sampling.repetition_penalty
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token, count in counts.items():
        out[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        out[token] += bias
    return out


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.lists(tokens, min_size=1, max_size=12),
    output=st.lists(tokens, max_size=30),
    repetition=st.sampled_from([1.0, 0.8, 1.3]),
    presence=st.sampled_from([0.0, 0.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.25, -1.0]),
    bias=st.dictionaries(tokens, st.sampled_from([-100.0, 0.5, 7.0]), max_size=5),
    looks=st.sets(st.integers(0, 30)),
)
def test_edits_are_the_penalties_whenever_they_are_asked_for(
    prompt, output, repetition, presence, frequency, bias, looks
):
    sampling = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    request = make_request("a", prompt)
    editor = LogitEditor(sampling, prompt)
    logits = np.random.default_rng(0).normal(size=64).astype(np.float32)
    for count in range(len(output) + 1):
        if count in looks or count == len(output):
            request.output_token_ids = output[:count]
            expected = penalized(logits, sampling, prompt, output[:count])
            np.testing.assert_allclose(edited(logits, editor.edits(request)), expected, atol=1e-4)


def test_edits_outgrow_their_first_arrays():
    prompt = list(range(900))
    editor = LogitEditor(SamplingParams(repetition_penalty=2.0), prompt)
    edits = editor.edits(make_request("a", prompt))
    assert sorted(np.frombuffer(edits.ids, np.int32)) == prompt


def allowed_tokens(sampling: SamplingParams, output: list[int], *, bad=(), stop_ids=(2,)) -> set[int]:
    request = make_request("a", [5, 6])
    request.output_token_ids += output
    message = AddRequest("a", array("i", [5, 6]).tobytes(), sampling, 8, stop_ids, bad_token_ids=bad)
    mask = np.full(-(-VOCAB_SIZE // 32), 0xFFFFFFFF, dtype=np.uint32)
    for processor in make_processors(message, VOCAB_SIZE):
        if processor.applies(request.num_known):
            processor.allowed(request, request.num_known, mask)
    return {token for token in range(VOCAB_SIZE) if mask[token // 32] >> np.uint32(token % 32) & np.uint32(1)}


def test_only_allowed_tokens_are_allowed():
    assert allowed_tokens(SamplingParams(allowed_token_ids=(3, 64, 999)), []) == {3, 64, 999}


@pytest.mark.parametrize(
    ("output", "forbidden"), [([], {9}), ([7], {8, 9}), ([7, 8], {9, 10}), ([8], {9}), ([7, 8, 7], {8, 9})]
)
def test_a_bad_word_is_never_completed(output, forbidden):
    found = allowed_tokens(SamplingParams(), output, bad=((9,), (7, 8), (7, 8, 10)))
    assert set(range(VOCAB_SIZE)) - found == forbidden


def test_a_prompt_that_ends_in_a_bad_words_beginning_does_not_count():
    assert 9 in allowed_tokens(SamplingParams(), [], bad=((6, 9),))


def test_a_restriction_that_leaves_nothing_gives_way():
    core = make_core(make_scheduler())
    core.add(add_message("a", [5, 6], max_output=1, allowed_token_ids=(2,), min_tokens=1))
    core.step()
    (mask,) = core.executor.late[0].masks.values()
    words = np.frombuffer(mask, np.uint32)
    assert words[0] == 1 << 2 and not words[1:].any()


def test_each_sequence_keeps_its_own_counts():
    core = make_core(make_scheduler())
    core.add(add_message("a", [5, 6], max_output=3, n=2, frequency_penalty=1.0))
    editors = [core.scheduler.requests["a"][index].editor for index in range(2)]
    assert editors[0] is not editors[1]
    while core.has_work:
        core.step()
    edits = [edits for late in core.executor.late for edits in late.edits.values()]
    assert sorted(np.frombuffer(e.shifts, np.float32).item() for e in edits) == [-2, -2, -1, -1]
    assert {np.frombuffer(e.ids, np.int32).item() for e in edits} == {TOKEN}


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

        def allowed(self, request, position, mask):
            mask[:] = 0
            mask[0] = 1 << 9

    core = make_core(make_scheduler())
    core.add(msgspec.structs.replace(add_message("a", [5, 6], max_output=1), bad_token_ids=((9,),)))
    (request,) = core.scheduler.sequences("a")
    request.processors = (OnlyNine(), *request.processors)
    core.step()
    words = np.frombuffer(core.executor.late[0].masks[0], np.uint32)
    assert words[0] == 1 << 9 and not words[1:].any()
