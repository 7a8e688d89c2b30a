"""The private folder of one engine: its sockets, and the file where ranks meet."""

from __future__ import annotations

import tempfile

from anychip.errors import ConfigError

_LONGEST = 107 - len("/worker-999")
"""A Unix socket's address holds 107 bytes."""


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder that only this user can enter. Raises ConfigError where its sockets' names would be too long."""
    folder = tempfile.TemporaryDirectory(prefix="anychip-")
    if len(folder.name.encode()) > _LONGEST:
        path = folder.name
        folder.cleanup()
        raise ConfigError(
            f"the temporary folder {path} is {len(path)} bytes long, and a socket in it may have {_LONGEST} at most; "
            "set TMPDIR to a shorter path"
        )
    return folder
