"""Overrides of single ops: none yet, the reference runs on the host as it is."""

from collections.abc import Callable, Mapping
from typing import Any

OVERRIDES: Mapping[str, Callable[..., Any]] = {}
