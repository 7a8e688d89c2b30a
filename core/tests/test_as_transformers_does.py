"""Tokenizers and chat templates are read as transformers reads them, whichever files a folder has."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from anychip.errors import InvalidRequest
from anychip.hub import resolve_folder
from anychip.tokenizer.chat_template import ChatTemplate
from anychip.tokenizer.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

_TEXT = "a <x>b<e>[PAD]<s> <y>  <img> c a"
_TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
_FILES = {
    "tokenizer_config.json": [
        {},
        {"bos_token": "<s>", "pad_token": "[PAD]", "image_token": "<img>"},
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True},
            "additional_special_tokens": ["<x>", "<e>"],
        },
        {"eos_token": "<e>", "extra_special_tokens": {"image_token": "<img>"}},
        {"extra_special_tokens": ["<y>"], "additional_special_tokens": ["<x>"]},
        {"added_tokens_decoder": {"9": {"content": "<x>", "special": True}, "10": {"content": "<y>", "rstrip": True}}},
    ],
    "special_tokens_map.json": [
        None,
        {"bos_token": "<s>", "eos_token": {"content": "<e>", "lstrip": False}},
        {"additional_special_tokens": ["<y>", "<x>"]},
    ],
    "added_tokens.json": [None, {"<x>": 9}, {"<y>": 10, "<e>": 9}],
    "tokenizer.json": [None, {"truncation": _TRUNCATION}],
}  # fmt: skip
_VARIANTS = list(itertools.product(*_FILES.values()))


def folder_of(tmp_path: Path, contents) -> Path:
    raw = tokenizers.Tokenizer(models.WordLevel({word: at for at, word in enumerate("?abc<>xye")}, "?"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    raw.decoder = decoders.Fuse()
    files = dict(zip(_FILES, contents, strict=True))
    own = json.loads(raw.to_str()) | (files.pop("tokenizer.json") or {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    for name, content in files.items():
        if name == "tokenizer_config.json":
            content = {**content, "tokenizer_class": "PreTrainedTokenizerFast"}
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("number", range(0, len(_VARIANTS), 5))  # all 108 take ten seconds
def test_special_tokens_come_from_every_file(tmp_path, number):
    folder = folder_of(tmp_path, _VARIANTS[number])
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(str(folder))
    assert ours.raw.get_vocab() == reference.get_vocab()
    assert ours.encode(_TEXT) == reference.encode(_TEXT, truncation=False)
    every = list(range(len(reference)))
    assert ours.decode(every) == reference.decode(every, skip_special_tokens=True)
    names = "{{bos_token}}|{{eos_token}}|{{pad_token}}|{{image_token}}|{{mask_token is defined}}"
    (folder / "chat_template.jinja").write_text(names)
    named = Tokenizer.load(str(folder)).apply_chat_template([{"role": "user", "content": ""}])
    assert named == reference.apply_chat_template(
        [{"role": "user", "content": ""}], chat_template=names, tokenize=False
    )


_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"b": "<é>", "a": 1}}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_CONVERSATIONS = [
    [{"role": "user", "content": 'Hi <b> & "é"'}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [_CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "abcdefghi", "name": None},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": " Thanks\n"},
    ],
]
_OPTIONS = [
    {},
    {"tools": [_TOOL]},
    {"documents": [{"title": "t", "text": "x"}], "enable_thinking": False},
    {"add_generation_prompt": False},
]
_LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
_TEMPLATES = {
    "generation": _LOOP
    % "{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}"
    "{{ x is defined }}{% endif %}",
    "tojson": _LOOP % "{{ m | tojson }}{{ m | tojson(indent=2) }}"
    "{{ m | tojson(separators=(',', ':'), sort_keys=True) }}"
    "{{ m | tojson(True) }}{{ m | tojson(ensure_ascii=True, indent=1) }}",
    "none": "{{ documents is none }}{{ tools is none }}{{ documents is defined }}{{ tools is defined }}"
    "{{ enable_thinking is defined }}{{ bos_token is defined }}{{ mask_token is defined }}{{ eos_token }}",
    "null fields": _LOOP % "{{ m.keys() | list }}{{ m.content is defined }}{{ m.thinking }}{{ 'name' in m }}",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
    "{% if tools %}{{ tools }}{% endif %}",
    "loops": _LOOP % "{% if m.role == 'tool' %}{% continue %}"
    "{% elif loop.index0 > 3 %}{% break %}{% endif %}\n  {{ m.role }}",
    "globals": "{{ strftime_now('%Y') }}{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(a=1) }}"
    "{{ range(3) | list }}{{ cycler('a', 'b').next() }}{{ joiner(',') is defined }}{{ lipsum is defined }}",
    "blocks": "{%- macro say(m) -%}\n  <{{ m.role }}>\n    {% if m.content %}  "
    "{{ m.content | trim }}\n    {% endif %}\n"
    "{% endmacro -%}\n" + _LOOP % "{{ say(m) }}" + "\n{% if add_generation_prompt %}<go>{% endif %}\n",
    "filters": _LOOP % "{{ m.role | upper | replace('U', 'V') }}{{ m | items | list | length }}"
    "{{ (m.content or '')[:2] | e }}"
    "{{ m.role.split('e') }}{{ m.get('x', 'none') }}{{ m.role is string }}",
    "arguments": _LOOP % "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}",
    "refuses": "{% if tools %}{{ raise_exception('no tools') }}{% endif %}ok",
}  # fmt: skip


def carried() -> dict[str, str]:
    """Chat templates that installed packages and the embedded model bring."""
    roots = [Path(transformers.__file__).parents[1], resolve_folder("quickstart")]
    files = [file for root in roots for file in root.glob("*/*chat_template*.jinja")]
    settings = json.loads((resolve_folder("quickstart") / "tokenizer_config.json").read_text())
    return {file.name: file.read_text() for file in files} | {"quickstart": settings["chat_template"]}


@pytest.fixture(scope="module")
def reference():
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(resolve_folder("quickstart") / "tokenizer.json"),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )


@pytest.mark.parametrize("name", [*_TEMPLATES, *carried()])
def test_a_template_renders_as_transformers_renders_it(reference, name):
    source = (_TEMPLATES | carried())[name]
    ours = ChatTemplate(source + "{# tools #}", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    for messages, given in itertools.product(_CONVERSATIONS, _OPTIONS):
        options = {"add_generation_prompt": True} | given
        expected: Any = None
        # Clients send null beside a call: a template that refuses it gets an empty text.
        for given_ones in (messages, [{**m, "content": m.get("content") or ""} for m in messages]):
            try:
                expected = reference.apply_chat_template(given_ones, chat_template=source, tokenize=False, **options)
                break
            except jinja2.TemplateError as error:
                expected = expected or error
        tools, add = options.pop("tools", ()), options.pop("add_generation_prompt")
        if isinstance(expected, Exception):
            with pytest.raises(InvalidRequest, match=str(expected)):
                ours.render(messages, tools=tools, add_generation_prompt=add, variables=options)
        else:
            assert ours.render(messages, tools=tools, add_generation_prompt=add, variables=options) == expected
