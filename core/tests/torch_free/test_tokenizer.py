"""Chat templates are rendered in a sandbox; what they refuse is the client's error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anychip.errors import CheckpointError, InvalidRequest
from anychip.hub import resolve_folder
from anychip.tokenizer.tokenizer import Tokenizer

TURN = [{"role": "user", "content": "Hi"}]


def with_template(tmp_path: Path, template: object) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((resolve_folder("quickstart") / "tokenizer.json").read_bytes())
    settings = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(str(tmp_path))


def test_the_embedded_models_template_ends_where_the_answer_begins():
    text = Tokenizer.load("quickstart").apply_chat_template(TURN)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_and_loop_controls_are_there(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
    assert with_template(tmp_path, template).apply_chat_template(TURN * 2) == "<s>Hi"


def test_a_template_of_several_takes_the_default(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert with_template(tmp_path, several).apply_chat_template(TURN) == "yes"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "{% if %}"],
)
def test_what_a_template_refuses_is_an_invalid_request(tmp_path, template):
    with pytest.raises(InvalidRequest, match="the chat template refused the messages"):
        with_template(tmp_path, template).apply_chat_template(TURN)


def test_a_model_without_a_template_says_so(tmp_path):
    with pytest.raises(InvalidRequest, match="has no chat template; use completions"):
        with_template(tmp_path, None).apply_chat_template(TURN)


def test_a_checkpoint_without_a_tokenizer_names_the_way_out(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json is missing; use --skip-tokenizer"):
        Tokenizer.load(str(tmp_path))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    size = Tokenizer.load("quickstart").raw.get_vocab_size(with_added_tokens=True)
    Tokenizer.load("quickstart", size)
    with pytest.raises(CheckpointError, match=f"ids up to {size - 1}, the model's vocabulary has {size - 1}"):
        Tokenizer.load("quickstart", size - 1)


def test_tokens_added_after_the_fact_get_their_ids(tmp_path):
    size = Tokenizer.load("quickstart").raw.get_vocab_size(with_added_tokens=True)
    with_template(tmp_path, "")
    added = {str(size): {"content": "<|tool|>", "special": True}, str(size + 1): {"content": "<sum>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(str(tmp_path))
    ids = tokenizer.encode("a<|tool|><sum>", add_special_tokens=False)
    assert ids[-2:] == [size, size + 1]
    assert tokenizer.decode(ids) == "a<sum>"
