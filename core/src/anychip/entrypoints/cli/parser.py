"""How the command line is read: what cannot be read ends with one line that has cause and remedy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """Argparse prints the whole usage before an error, which hides the error where a command has a hundred options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what is unknown here, where the command is known that it was given to."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(_unknown(unknown, re.findall(r"--[a-z][\w-]*", self.format_help())))
        return known, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"anychip: {message}; `{self.prog} --help` lists what there is\n")


def _unknown(arguments: Sequence[str], options: Sequence[str]) -> str:
    """What is said of arguments that are none of these options."""
    text = f"unknown {', '.join(arguments)}"
    near = get_close_matches(arguments[0].partition("=")[0], options, n=1)
    return f"{text}: did you mean {near[0]}?" if near else text
