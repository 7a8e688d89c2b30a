"""Chat templates are rendered in a sandbox; what they refuse is the client's error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anychip.errors import CheckpointError, InvalidRequest
from anychip.hub import resolve_folder
from anychip.tokenizer.chat_template import ChatTemplate
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


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FIRST_ONLY = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}"
    "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
REFUSES_A_SECOND = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
USER, CODEX = message("user", "u"), [message("system", "s"), message("developer", "d"), message("user", "u")]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (EACH, [message("developer", "d"), USER], "<system>d<user>u"),
        (EACH, CODEX, "<system>s\n\nd<user>u"),
        (EACH, [message("developer", "a"), message("developer", "b"), USER], "<system>a\n\nb<user>u"),
        (EACH, [USER, message("developer", "d"), USER], "<user>u<system>d<user>u"),
        (FIRST_ONLY, [message("system", "s"), USER, message("developer", "d"), USER], "<system>s\n\nd<user>u<user>u"),
        (REFUSES_A_SECOND, [USER, message("developer", "d"), USER], "<system>d<user>u<user>u"),
        (EACH + "{# 'developer' #}", CODEX, "<system>s<developer>d<user>u"),
        (EACH, [message("system", "s"), message("system", "t"), USER], "<system>s<system>t<user>u"),
    ],
)
def test_developer_messages_stand_where_the_template_reads_them(template, messages, expected):
    assert ChatTemplate(template, {}).render(messages) == expected


def test_a_conversation_with_tools_takes_the_template_for_tools(tmp_path):
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "no"}]
    tool = {"type": "function", "function": {"name": "f"}}
    assert with_template(tmp_path, several).apply_chat_template(TURN, tools=[tool]) == "tools"


def test_truncation_and_padding_of_the_file_do_not_touch_prompts(tmp_path):
    raw = json.loads((resolve_folder("quickstart") / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = "What is the capital of France?"
    assert Tokenizer.load(str(tmp_path)).encode(text) == Tokenizer.load("quickstart").encode(text)
