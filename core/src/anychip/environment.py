"""The ANYCHIP_* variables: read here alone, and handed to the processes that this one starts."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from anychip.errors import ConfigError


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The ANYCHIP_* variables. An unknown one is an error, so that a misspelling is not silence."""

    log_level: str = "info"
    device: str = "auto"
    api_key: str | None = None
    admin_key: str | None = None
    log_format: str = "text"

    @classmethod
    def read(cls, *, child: bool = False) -> Environment:
        """Raises ConfigError for a variable that is none; in a child, platforms have added theirs."""
        known = {f"ANYCHIP_{name.upper()}": name for name in cls.__struct_fields__}
        found = {key: value for key, value in os.environ.items() if key.startswith("ANYCHIP_")}
        if not child and (unknown := sorted(set(found) - set(known))):
            raise ConfigError(f"unknown variable {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**{known[key]: value for key, value in found.items() if key in known})


def child_environment(extra: Mapping[str, str], unset: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process: this one's, with a platform's additions, and with `unset` where it has no
    such variable."""
    return {**(unset or {}), **os.environ, **extra}
