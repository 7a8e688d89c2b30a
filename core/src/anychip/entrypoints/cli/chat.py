"""`anychip chat`: a conversation in the terminal, the engine in this process."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from anychip.entrypoints.cli.generate import add_sampling_options, open_llm, print_outputs, sampling_params
from anychip.entrypoints.cli.options import add_engine_options
from anychip.environment import Environment


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    add_engine_options(parser, environment)
    add_sampling_options(parser)
    parser.add_argument("--system", help="the system message")


def run(arguments: argparse.Namespace) -> int:
    messages: list[dict[str, Any]] = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    with open_llm(arguments) as llm:
        print("an empty line or Ctrl-D ends the conversation", file=sys.stderr)
        while text := _ask():
            messages.append({"role": "user", "content": text})
            reply = print_outputs(llm.stream_chat(messages, sampling_params(llm, arguments)))
            messages.append({"role": "assistant", "content": reply})
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
