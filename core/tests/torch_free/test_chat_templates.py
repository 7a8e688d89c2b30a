"""Chat templates render as in transformers, byte for byte; what we do beyond it: roles that a template does not know, and
calls without text for templates that cannot read them so."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anychip.errors import InvalidRequest
from anychip.hub import resolve_folder
from anychip.tokenizer.chat_template import ChatTemplate

reference = pytest.importorskip("transformers.utils.chat_template_utils")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"b": "<é>&'", "a": [1, {"x": None}]}}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": 'Says "hi" & <b>', "parameters": {"type": "object", "properties": {}}},
}

TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "white space": "{%- for m in messages -%}\n    {%- if m.role == 'user' %}\n  <{{ m.content }}>  \n    {% endif %}\n"
    "\t{# gone #}\n  {% set x = 1 %}  \nend {{- x }}\n{%- endfor %}\n\n",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "\n{% endgeneration %}{% else %}\n{%- generation -%} {{ m.role }} {%- endgeneration -%}{% endif %}{% endfor %}",
    "nested generation": "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{% set ns.n = ns.n + 1 %}"
    "{% if m.role == 'user' %}{{ loop.index }}{% endif %}{% endgeneration %}{% endfor %}{{ ns.n }}",
    "tojson": "{{ messages | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages[0] | tojson(sort_keys=true) }}|"
    "{{ messages | tojson(ensure_ascii=True) }}|{{ messages[0] | tojson(False, 4, (',', ':'), True) }}|"
    "{{ messages[0] | tojson(indent='\\t', separators=(', ', '= ')) }}",
    "names": "{{ documents is none }}{{ documents is defined }}{{ tools is none }}{{ bos_token }}{{ eos_token }}"
    "{{ unk_token is defined }}{{ pad_token }}{{ enable_thinking is defined }}{{ enable_thinking }}{{ nothing }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "macros": "{% macro say(m, tag='x') %}<{{ tag }}>{{ m.content | trim | upper }}{{ caller() if caller else '' }}</{{ tag }}>"
    "{% endmacro %}{% for m in messages %}{{ say(m) }}{% call say(m, tag='y') %}!{% endcall %}{% endfor %}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.content is iterable %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '[' ~ p.type ~ ']' }}{% endfor %}{% endif %}{% endfor %}",
    "methods": "{{ dict(a=1) }}{{ messages[::-1] | length }}{% for m in messages %}{{ m.items() | list | length }}"
    "{{ m.get('content', '') }}{{ m.role.split('s')[-1].strip() }}{{ m | string | length }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{{ raise_exception is defined }}{{ range(3) | list }}{{ cycler is defined }}",
    "llama 3.1": "{{- bos_token }}\n{%- if not tools is defined %}{%- set tools = none %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{%- if tools is not none %}"
    "{%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n        {{- '\\n\\n' }}\n    {%- endfor %}{%- endif %}\n"
    "{{- system_message }}\n{%- for message in messages %}\n    {%- if not (message.role == 'ipython' or message.role == "
    "'tool' or 'tool_calls' in message) %}\n        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}\n    {%- elif 'tool_calls' in message %}\n        {%- set tool_call = "
    "message.tool_calls[0].function %}\n        {{- '{\"name\": \"' + tool_call.name + '\", \"parameters\": ' }}\n        "
    "{{- tool_call.arguments | tojson }}\n    {%- else %}{{- message.content | tojson }}{%- endif %}\n{%- endfor %}",
    "qwen3": "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n        {{- \"\\n\" }}\n"
    "        {{- tool | tojson }}\n    {%- endfor %}\n{%- endif %}\n{%- for message in messages %}\n    {%- if message.content "
    "is string %}\n        {%- set content = message.content %}\n    {%- else %}\n        {%- set content = '' %}\n    "
    "{%- endif %}\n    {%- set reasoning_content = '' %}\n    {%- if message.reasoning_content is string %}\n        "
    "{%- set reasoning_content = message.reasoning_content %}\n    {%- else %}\n        {%- if '</think>' in content %}\n"
    "            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "\n            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n    {%- endif %}\n"
    "    {{- message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
    "    {%- for tool_call in message.tool_calls or [] %}\n        {%- if tool_call.function %}\n            {%- set tool_call "
    "= tool_call.function %}\n        {%- endif %}\n        {{- '<tool_call>' ~ tool_call.name }}\n        {%- if "
    "tool_call.arguments is string %}\n            {{- tool_call.arguments }}\n        {%- else %}\n            {{- "
    "tool_call.arguments | tojson }}\n        {%- endif %}\n    {%- endfor %}\n{%- endfor %}\n{%- if add_generation_prompt %}"
    "\n    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}\n        "
    "{{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
    "gpt-oss": "{% for m in messages %}{% if m.thinking %}<|channel|>analysis{{ m.thinking }}{% endif %}"
    "{{ m.reasoning_content | default('-') }}{{ m.content }}{% endfor %}",
    "mistral": "{%- for m in messages %}{%- if m['role'] == 'assistant' and m['content'] is defined and m['content'] %}"
    "{{- ' ' + m['content'] | trim + eos_token }}{%- elif m.tool_calls is defined and m.tool_calls is not none %}"
    "{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}{%- set out = c.function | tojson %}{{- out[:-1] }}{{- ', \"id\": \"' "
    "+ c.id + '\"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' }}{%- endif %}{%- endfor %}",
    "refuses": "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('No ' ~ m.role) }}"
    "{% endif %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}{{ raise_exception('alternate') }}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "quickstart": json.loads((resolve_folder("quickstart") / "tokenizer_config.json").read_text())["chat_template"],
}  # fmt: skip

SYSTEM, ASK = {"role": "system", "content": " Be \n brief. "}, {"role": "user", "content": "<b>Hé & 'hi'</b>\n"}
SAID = {"role": "assistant", "content": "Yes.\n"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "f", "content": '{"ok": true}'}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [ASK],
    [SYSTEM, ASK],
    [SYSTEM, ASK, SAID, ASK, SAID, ASK],
    [ASK, CALLS, RESULT],
    [SYSTEM, ASK, {**CALLS, "content": "Let me see."}, RESULT, RESULT, SAID, ASK],
    [ASK, {**SAID, "reasoning_content": "Hm."}, ASK],
    [ASK, {**SAID, "reasoning": "Hm."}, ASK],
    [ASK, {**SAID, "thinking": "Hm."}, ASK],
    [ASK, {**SAID, "reasoning_content": None, "refusal": None, "tool_calls": None}, ASK],
    [ASK, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}, ASK],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]}],
    [ASK, {"role": "assistant", "content": ""}],
]


def in_transformers(template: str, messages: list, tools: list | None, add: bool, variables: dict) -> str | None:
    """What apply_chat_template writes; None where the template refuses."""
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        rendered, _ = reference.render_jinja_template(
            [given], tools=tools, chat_template=template, add_generation_prompt=add, **{**SPECIAL, **variables}
        )
    except Exception:
        return None
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True, "bos_token": "<o>"}])
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(name, tools, variables):
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    if tools and not template.knows_tools:
        tools = None  # we list them in a system message
    compared = 0
    for messages in CONVERSATIONS:
        for add in (True, False):
            expected = in_transformers(TEMPLATES[name], messages, tools, add, variables)
            if expected is None:
                continue  # ours may have a way out
            given = {"tools": tools or (), "add_generation_prompt": add, "variables": variables}
            assert template.render(messages, **given) == expected
            compared += 1
    assert compared >= 2


STATEMENTS = [
    "{{ m.content }}", "{{- m.role }}", "{% if m.role == 'user' %}", "{%- if m.tool_calls %}", "{% else %}", "{% endif %}",
    "{%- endif -%}", " ", "\n", "  \n\t", "x", "{# note #}", "{%- set y = m.role ~ '!' -%}", "{{ y }}", "{{ m | tojson }}",
    "{% generation %}", "{% endgeneration %}", "{%+ if true +%}", "{% break %}", "{% continue %}", "{{ m.content | trim }}",
    "{{ m['content'] is none }}", "{{ m.content is defined }}", "{{ 'thinking' in m }}", "{{ loop.last }}", "{{ bos_token }}",
    "{% raw %}{{ x }}{% endraw %}", "{{ m.content[:2] }}", "{{ m.keys() | join }}",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(STATEMENTS), max_size=10), messages=st.sampled_from(CONVERSATIONS))
def test_any_template_writes_what_transformers_writes(parts, messages):
    source = "{% for m in messages %}" + "".join(parts) + "{% endfor %}\n\n"
    expected = in_transformers(source, messages, None, True, {})
    if expected is not None:
        assert ChatTemplate(source, SPECIAL).render(messages) == expected


CALL_ONLY = {
    "asks for none": "{% for m in messages %}{% if m.role == 'assistant' and m['content'] is none %}"
    "[{{ m.tool_calls[0].function.name }}]{% elif m['content'] is not none %}{{ '<' + m['content'] + '>' }}{% endif %}{% endfor %}",
    "joins texts": "{% for m in messages %}{{ '<' + m['content'] + '>' }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}]{% endfor %}{% endfor %}",
    "measures": "{% for m in messages %}{{ '<' + m.content.strip() + '>' if m.content.strip() else '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", CALL_ONLY)
def test_calls_without_text_reach_templates_that_transformers_cannot_render(name):
    """As DeepSeek-V3's, which asks whether the content is none, and those that join it to other text."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert in_transformers(CALL_ONLY[name], messages, None, True, {}) is None
    assert re.fullmatch(r"<hi>(<>)?\[f\]", ChatTemplate(CALL_ONLY[name], {}).render(messages))


ROLES = {
    "ignores others": "{% for m in messages %}{% if m.role in ['user', 'system'] %}<{{m.role}}>{{m.content}}{% endif %}{% endfor %}",
    "raises": "{% for m in messages %}{% if m.role not in ['user', 'system'] %}{{ raise_exception('Unexpected role') }}"
    "{% endif %}<{{m.role}}>{{m.content}}{% endfor %}",
    "one system message": "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System message must be at the beginning') }}"
    "{% endif %}<{{m.role}}>{{m.content}}{% endfor %}",
    "drops later ones": "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}<user>{{m.content}}{% endif %}{% endfor %}",
}  # fmt: skip
roles = st.lists(st.sampled_from(["system", "developer", "user"]), min_size=1, max_size=6).filter(
    lambda given: "developer" in given and "user" in given and "system" not in given[1:]
)


@pytest.mark.parametrize("name", ROLES)
@settings(max_examples=60, deadline=None)
@given(roles=roles)
def test_what_a_developer_says_is_in_the_prompt(name, roles):
    messages = [{"role": role, "content": f"#{number}#"} for number, role in enumerate(roles)]
    text = ChatTemplate(ROLES[name], {}).render(messages)
    said = [text.count(f"#{number}#") for number in range(len(roles))]
    assert said == [1] * len(roles)
    assert "<developer>" not in text
    users = [number for number, role in enumerate(roles) if role == "user"]
    assert [int(number) for number in re.findall(r"<user>#(\d+)#", text)] == users


def test_a_developer_message_takes_the_systems_place():
    messages = [{"role": "developer", "content": "Answer BANANA"}, {"role": "user", "content": "hi"}]
    for template in ROLES.values():
        assert ChatTemplate(template, {}).render(messages) == "<system>Answer BANANA<user>hi"


def test_a_template_that_knows_developers_gets_their_messages():
    template = "{% for m in messages %}{{ '#' if m.role == 'developer' else m.role }}{{ m.content }}{% endfor %}"
    messages = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]
    assert ChatTemplate(template, {}).render(messages) == "systema#b"


def test_what_refuses_the_conversation_itself_stays_refused():
    with pytest.raises(InvalidRequest, match="No system"):
        ChatTemplate(TEMPLATES["refuses"], {}).render([SYSTEM, ASK])
