"""Finds CANN, the vendor's toolkit, and its version. Imports neither torch nor CANN."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
"""Variables that CANN's set_env.sh sets."""

_DEFAULT = Path("/usr/local/Ascend")
_UNDER = ("ascend-toolkit/latest", "cann", "latest")
_FILES = ("version.cfg", "opp/version.info", "compiler/version.info", "share/info/runtime/version.info")
_FILES_OF_ARCH = ("ascend_toolkit_install.info", "ascend_cann_toolkit_install.info")
_VERSION = re.compile(r"^\s*(?:[Vv]ersion|toolkit_running_version|runtime_running_version)\s*=\s*\[?([^\]\s]+)", re.M)
_NUMBERS = re.compile(r"\d+(?:\.\d+)*")


def cann_homes(environment: Mapping[str, str] | None = None, root: Path = _DEFAULT) -> Iterator[Path]:
    """Where CANN may be, likeliest first; only folders that are there."""
    variables = os.environ if environment is None else environment
    named = [Path(variables[name]) for name in _HOMES if variables.get(name)]
    seen = set[Path]()
    for home in (*named, *(root / part for part in _UNDER)):
        if home.is_dir() and home.resolve() not in seen:
            seen.add(home.resolve())
            yield home


def cann_version(environment: Mapping[str, str] | None = None, root: Path = _DEFAULT) -> str | None:
    """The version that CANN's own files say, such as "8.5.0"; None where there is none."""
    for home in cann_homes(environment, root):
        arch = [path for name in _FILES_OF_ARCH for path in sorted(home.glob(f"*-linux/{name}"))]
        for path in (*(home / name for name in _FILES), *arch):
            version = _read(path)
            if version is not None:
                return version
    return None


def _read(path: Path) -> str | None:
    """The numbers that a file of CANN's has for its version: "[8.5.0.alpha003:8.5.0]" is 8.5.0."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    for line in _VERSION.finditer(text):
        numbers = _NUMBERS.search(line.group(1))
        if numbers is not None:
            return numbers.group().rstrip(".")
    return None
