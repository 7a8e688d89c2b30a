"""Log lines: text for people, JSON for machines. Prompts and answers are in neither."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import msgspec

from anychip.environment import Environment
from anychip.errors import ConfigError

_FIELDS = ("request_id", "tenant", "status", "seconds", "prompt_tokens", "output_tokens", "finish_reason")
"""What a record may carry beside its message."""


class JsonLines(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in _FIELDS if hasattr(record, name)},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class TextLines(logging.Formatter):
    """The message, and the id of the request that it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        request_id = getattr(record, "request_id", "")
        return f"{line} [{request_id}]" if request_id else line


def configure_logging(environment: Environment) -> None:
    """Of this process. Libraries log warnings; anychip as much as ANYCHIP_LOG_LEVEL says. Raises ConfigError."""
    if environment.log_format not in ("text", "json"):
        raise ConfigError(f"ANYCHIP_LOG_FORMAT is {environment.log_format!r}; expected text or json")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if environment.log_format == "json" else TextLines("%(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], force=True)
    try:
        logging.getLogger("anychip").setLevel(environment.log_level.upper())
    except ValueError as error:
        raise ConfigError(f"ANYCHIP_LOG_LEVEL: {error}") from error
