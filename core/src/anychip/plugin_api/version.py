"""The interface's version and who may speak with whom.

0.x until the cpu and cuda plugins are fast on it: a minor version may change anything, so core accepts its own
minor and the one before. From 1.0 on, core N accepts plugins of major N and N-1.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from anychip.errors import IncompatiblePlugin

API_VERSION = "0.2"


_CHANGES = "docs/reference/versioning.md says what 0.2 changed for a plugin"


def check_api_version(plugin: str, declared: str, *, seam: str = "torch") -> None:
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
    if (major, minor) == (0, 1) and seam == "step":
        raise IncompatiblePlugin(
            f"{plugin}: its step program was written against interface 0.1, in which a row draws one token; in 0.2 a "
            f"row has samples, one or several: take SamplingInputs by sample, return token_ids [num_samples], and set "
            f"api_version to 0.2; {_CHANGES}"
        )
    if not accepted:
        advice = "upgrade the plugin" if (major, minor) < (own_major, own_minor) else "upgrade anychip"
        raise IncompatiblePlugin(
            f"{plugin}: built against interface {declared}, this core speaks {API_VERSION} and the one before; {advice}"
        )


def check_shape_policy(plugin: str, bucket: Callable[..., Any]) -> None:
    """Raises IncompatiblePlugin for a ShapePolicy.bucket of interface 0.1."""
    parameters = signature(bucket).parameters.values()
    if not any(each.name == "num_samples" or each.kind is each.VAR_KEYWORD for each in parameters):
        raise IncompatiblePlugin(
            f"{plugin}: {bucket.__qualname__} takes no num_samples, which interface 0.2 added: a step has num_samples "
            f"draws in num_reqs rows, and a ShapeKey holds both; {_CHANGES}"
        )
