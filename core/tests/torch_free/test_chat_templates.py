"""Chat templates render as in transformers, byte for byte. What we do beyond it: roles that a template does not know,
and calls without text for templates that cannot read them so."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from anychip.errors import InvalidRequest
from anychip.tokenizer.chat_template import ChatTemplate

reference = pytest.importorskip("transformers.utils.chat_template_utils")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"b": "<é>&'", "a": [1, {"x": None}]}}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": 'Says "hi" & <b>', "parameters": {"type": "object", "properties": {}}},
}

TEMPLATES = {
    "white space": """
{%- for m in messages -%}
    {%- if m.role == 'user' %}
  <{{ m.content }}>\t
    {% endif %}
\t{# gone #}
  {% set x = 1 %}\t
end {{- x }}
{%- endfor %}


""",
    "nested generation": """
{% set seen = namespace(n=0) %}
{% for m in messages %}
  {% generation %}
    {% set seen.n = seen.n + 1 %}
    {%- if m.role == 'user' %}{{ loop.index }}{% endif %}
  {%- endgeneration %}
{% endfor %}
{{ seen.n }}""",
    "parts": """
{%- for m in messages %}
  {%- if m.content is string %}{{ m.content }}
  {%- elif m.content is iterable %}
    {%- for p in m.content %}{{ p.text if p.type == 'text' else '[' ~ p.type ~ ']' }}{% endfor %}
  {%- endif %}
{%- endfor %}""",
    "methods": """
{{ dict(a=1) }}{{ messages[::-1] | length }}
{% for m in messages %}
{{ m.items() | list | length }}{{ m.get('content', '') }}{{ m.role.split('s')[-1].strip() }}{{ m | string | length }}
{% endfor %}""",
    "a turn of tools": """
{{- bos_token }}
{%- set rules, rest = '', messages %}
{%- if messages[0].role == 'system' %}{% set rules, rest = messages[0].content | trim, messages[1:] %}{% endif %}
{%- if tools is not none and tools %}
  {%- for tool in tools %}{{ tool | tojson(indent=4) ~ '\\n\\n' }}{% endfor %}
{%- endif %}
{{- '[rules]\\n' + rules }}
{%- for m in rest %}
  {%- if 'tool_calls' in m %}
    {%- for call in m.tool_calls %}
      {{- '{"call": "' + call.function.name + '", "with": ' ~ (call.function.arguments | tojson) ~ '}' }}
      {%- if not loop.last %}{{ ', ' }}{% endif %}
    {%- endfor %}
  {%- elif m.role == 'tool' %}{{ m.content | tojson }}
  {%- else %}{{ '[' + m.role + ']\\n' + m.content | trim + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}""",
    "a turn of thoughts": """
{%- for m in messages %}
  {%- set answer = m.content if m.content is string else '' %}
  {%- set thought = '' %}
  {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
  {%- elif '</think>' in answer %}
    {%- set thought = (answer.split('</think>') | first).split('<think>')[-1].strip('\\n') %}
    {%- set answer = (answer.split('</think>') | last).lstrip('\\n') %}
  {%- endif %}
  {{- m.role ~ '\\n' ~ ('<think>' ~ thought ~ '</think>' if thought else '') ~ answer }}
  {%- if m.thinking %}{{ '<|channel|>' + m.thinking }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}
  {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}""",
    "content or calls": """
{%- for m in messages %}
  {%- if m['content'] is defined and m['content'] %}{{ ' ' + (m['content'] | string | trim) + eos_token }}
  {%- elif m.tool_calls is defined and m.tool_calls is not none %}
    {%- for call in m.tool_calls %}{{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{% endfor %}
  {%- endif %}
{%- endfor %}""",
    "refuses": """
{%- for m in messages %}
  {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('No ' ~ m.role) }}{% endif %}
  {%- if loop.index0 % 2 != (m.role == 'assistant') | int %}{{ raise_exception('alternate') }}{% endif %}
  {{- m.content }}
{%- endfor %}""",
}

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
    except (TemplateError, TypeError, SyntaxError):
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
    "{{ m.content }}", "{{- m.role }}", " ", "\n", "  \n\t", "x", "{# note #}", "{%- set y = m.role ~ '!' -%}",
    "{{ y }}", "{{ m | tojson }}", "{% break %}", "{% continue %}", "{{ m.content | trim }}",
    "{{ m['content'] is none }}",
    "{{ m.content is defined }}", "{{ 'thinking' in m }}", "{{ loop.last }}", "{{ bos_token }}", "{{ m.content[:2] }}",
    "{% raw %}{{ x }}{% endraw %}", "{{ m.keys() | join }}", "{{ documents }}{{ tools }}",
]  # fmt: skip


BLOCKS = [
    "{% if m.role == 'user' %}", "{%- if m.tool_calls %}", "{%+ if true +%}", "{% generation %}", "{%- generation -%}",
    "{% for c in m.tool_calls or [] %}", "{% filter upper %}",
]  # fmt: skip


def closed(block: str, inside: str, dash: str) -> str:
    name = block.strip("{%-+ }").split()[0]
    return f"{block}{inside}{{%{dash} end{name} {dash}%}}"


bodies = st.recursive(
    st.sampled_from(STATEMENTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.builds(closed, st.sampled_from(BLOCKS), inner, st.sampled_from(["", "-"])),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(body=bodies, messages=st.sampled_from(CONVERSATIONS))
def test_any_template_writes_what_transformers_writes(body, messages):
    source = "{% for m in messages %}" + body + "{% endfor %}\n\n"
    expected = in_transformers(source, messages, None, True, {})
    if expected is not None:
        assert ChatTemplate(source, SPECIAL).render(messages) == expected


def test_a_template_that_cannot_be_compiled_is_refused():
    """Jinja takes the words; what it makes of them is no Python."""
    source = "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="the chat template refused the messages: .*outside loop"):
        ChatTemplate(source, {}).render([ASK])


CALLED = "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
CALL_ONLY = {
    "asks for none": "{% if m['content'] is none %}" + CALLED + "{% else %}{{ '<' + m['content'] + '>' }}{% endif %}",
    "joins texts": "{{ '<' + m['content'] + '>' }}" + CALLED,
    "measures": "{{ '<' + m.content.strip() + '>' if m.content.strip() else '' }}" + CALLED,
}


@pytest.mark.parametrize("name", CALL_ONLY)
def test_calls_without_text_reach_templates_that_transformers_cannot_render(name):
    """As DeepSeek-V3's, which asks whether the content is none, and those that join it to other text."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    template = "{% for m in messages %}" + CALL_ONLY[name] + "{% endfor %}"
    assert in_transformers(template, messages, None, True, {}) is None
    assert re.fullmatch(r"<hi>(<>)?\[f\]", ChatTemplate(template, {}).render(messages))


EACH = "<{{ m.role }}>{{ m.content }}{% endfor %}"
FIRST = "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
ROLES = {
    "ignores others": "{% for m in messages if m.role in ['user', 'system'] %}" + EACH,
    "raises": "{% for m in messages %}{{ raise_exception('who?') if m.role not in ['user', 'system'] }}" + EACH,
    "one system message": "{% for m in messages %}{{ raise_exception('late') if m.role == 'system' and loop.index0 }}"
    + EACH,
    "drops later ones": FIRST + "{% for m in messages if m.role == 'user' %}" + EACH,
}
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


def test_a_developers_words_are_in_the_prompt_though_the_user_says_them_too():
    messages = [{"role": role, "content": "hi"} for role in ("user", "developer", "user")]
    assert ChatTemplate(ROLES["drops later ones"], {}).render(messages) == "<system>hi<user>hi<user>hi"


def test_what_refuses_the_conversation_itself_stays_refused():
    with pytest.raises(InvalidRequest, match="No system"):
        ChatTemplate(TEMPLATES["refuses"], {}).render([SYSTEM, ASK])
