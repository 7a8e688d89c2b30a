"""Bodies so long that their token ids are read apart give what short ones give."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.entrypoints.http.body import LONG_BODY, checked
from anychip.entrypoints.openai.protocol import CompletionBody
from anychip.errors import InvalidRequest

IDS = st.lists(st.integers(-3, 10**6), max_size=5)
PROMPTS = st.one_of(st.text(max_size=8), IDS, st.lists(IDS, max_size=3), st.lists(st.text(max_size=4), max_size=3))


def padded(body: object) -> bytes:
    return json.dumps(body).encode() + b" " * LONG_BODY


def result(raw: bytes, *, lenient: bool):
    try:
        return checked(raw, CompletionBody, lenient=lenient)
    except InvalidRequest as error:
        return str(error), error.param


@settings(max_examples=100, deadline=None)
@given(
    prompt=PROMPTS, more=st.sampled_from([{}, {"n": 2}, {"seed": "x"}, {"unknown": 1}, {"max_tokens": None}]),
    lenient=st.booleans(), first=st.booleans(),
)  # fmt: skip
def test_a_long_body_says_what_a_short_one_says(prompt, more, lenient, first):
    body = {"prompt": prompt, **more} if first else {**more, "prompt": prompt}
    assert result(padded(body), lenient=lenient) == result(json.dumps(body).encode(), lenient=lenient)


@pytest.mark.parametrize("prompt", [[1, "a"], [1, True], [1, 1.5], [[1], 2], [1, [2]], [[1], ["a"]], [1, None]])
def test_a_long_prompt_that_is_no_list_of_ids_is_refused_by_name(prompt):
    with pytest.raises(InvalidRequest, match="prompt") as refused:
        checked(padded({"prompt": prompt}), CompletionBody)
    assert refused.value.param == "prompt"


@pytest.mark.parametrize("raw", [b"[1, 2]", b"nothing", b"{", b'{"n": 1}', b'"prompt"'])
def test_a_long_body_that_is_no_request_is_refused(raw):
    with pytest.raises(InvalidRequest):
        checked(raw + b" " * LONG_BODY, CompletionBody)
