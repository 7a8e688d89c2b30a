"""`anychip hash-key`: a new API key for its holder, and the line that the server's file of keys gets."""

from __future__ import annotations

import argparse
import re
import sys

from anychip.entrypoints.http.keys import hashed, new_key
from anychip.environment import Environment
from anychip.errors import ConfigError


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("name", help="whose key it is: the tenant that limits and fair scheduling go by")
    parser.add_argument("--key", help="an existing key instead of a new one; - reads it from standard input")


def run(arguments: argparse.Namespace) -> int:
    if not re.fullmatch(r"[\w.@-]{1,64}", arguments.name):
        raise ConfigError(f"{arguments.name!r} is no name of 1 to 64 letters, digits, dots, dashes, @ or underscores")
    key = sys.stdin.readline().strip() if arguments.key == "-" else arguments.key
    if key is None:
        key = new_key()
        print(f"key (shown once): {key}", file=sys.stderr)
    print(f"{arguments.name}:{hashed(key)}")
    return 0
