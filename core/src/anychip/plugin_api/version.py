"""The interface's version and who may speak with whom.

0.x until the cpu and cuda plugins are fast on it: a minor version may change anything, so core accepts its own
minor and the one before. From 1.0 on, core N accepts plugins of major N and N-1.
"""

from __future__ import annotations

from anychip.errors import IncompatiblePlugin

API_VERSION = "0.1"


def check_api_version(plugin: str, declared: str) -> None:
    """Raises IncompatiblePlugin unless core speaks the version that a plugin was written against."""
    try:
        major, minor = (int(part) for part in declared.split(".")[:2])
    except ValueError:
        raise IncompatiblePlugin(
            f"{plugin}: api_version {declared!r} is not MAJOR.MINOR; this core speaks {API_VERSION}"
        ) from None
    own_major, own_minor = (int(part) for part in API_VERSION.split("."))
    if own_major == 0:
        accepted = major == 0 and own_minor - 1 <= minor <= own_minor
    else:
        accepted = own_major - 1 <= major <= own_major
    if not accepted:
        advice = "upgrade the plugin" if (major, minor) < (own_major, own_minor) else "upgrade anychip"
        raise IncompatiblePlugin(
            f"{plugin}: built against interface {declared}, this core speaks {API_VERSION} and the one before; {advice}"
        )
