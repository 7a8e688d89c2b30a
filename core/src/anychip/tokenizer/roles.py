"""Messages of the developer's, for templates that have no such role: they stand where system messages do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def with_known_roles(messages: Sequence[Message]) -> Sequence[Message]:
    """Developer messages as system messages. One that stands next to a system message becomes part of it: many
    templates take one only."""
    if not any(message.get("role") == "developer" for message in messages):
        return messages
    changed: list[Message] = []
    for message in messages:
        developer = message.get("role") == "developer"
        before = changed[-1] if changed else None
        if before is not None and before.get("role") == "system" and (developer or message.get("role") == "system"):
            changed[-1] = _joined([before, message])
        else:
            changed.append({**message, "role": "system"} if developer else message)
    return changed


def merged_at_the_beginning(messages: Sequence[Message]) -> Sequence[Message]:
    """One system message at the beginning, which says what all of them say."""
    system = [message for message in messages if message.get("role") == "system"]
    others = [message for message in messages if message.get("role") != "system"]
    return [_joined(system), *others] if system else messages


def _joined(messages: Sequence[Message]) -> Message:
    texts = [str(message.get("content") or "") for message in messages]
    return {**messages[0], "role": "system", "content": "\n\n".join(text for text in texts if text)}
