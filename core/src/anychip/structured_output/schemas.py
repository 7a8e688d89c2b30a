"""JSON schemas as values: finds the schemas within a schema. Says nothing of what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_DATA = frozenset({"const", "default", "enum", "examples"})
"""Keywords whose values are data, not schemas."""

_NAMED = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
"""Keywords whose values are schemas by name. The names are the user's, and may be words of JSON Schema."""

Schema = dict[str, Any]


def with_every(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """The schema, with `change` made to it and to every schema within it, from the inside out."""
    if isinstance(schema, list):
        return [with_every(part, change) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed: Schema = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            changed[key] = {name: with_every(part, change) for name, part in value.items()}
        else:
            changed[key] = value if key in _DATA else with_every(value, change)
    return change(changed)
