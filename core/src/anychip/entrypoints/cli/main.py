"""Entry of the `anychip` command. Errors that the user can mend end with one line and status 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import anychip
from anychip.entrypoints.cli.parser import CommandParser
from anychip.environment import Environment
from anychip.errors import AnychipError, ConfigError, UserError
from anychip.observability.logs import configure_logging
from anychip.registry.blame import blamed, imported
from anychip.registry.plugins import load_plugins

COMMANDS = {
    "serve": "serve a model over HTTP with OpenAI's and Anthropic's APIs",
    "join": "make this host one of the nodes of a server on another",
    "run-batch": "answer the requests of an OpenAI batch file",
    "hash-key": "make an API key, and the line of --api-keys for it",
    "generate": "continue a text",
    "chat": "talk to a model in the terminal",
    "quantize": "make a quantized checkpoint of a plain one",
    "merge-adapter": "write a checkpoint that has a LoRA adapter in its weights",
    "plan": "say how much memory a model would take, before it is loaded",
    "simulate": "predict throughput and latency on devices that are not there",
    "bench": "measure throughput, latency, start-up, or a server under load",
    "devices": "list installed devices, and why others cannot run",
    "doctor": "explain which device is chosen, and what is wrong with the others",
}
"""Each is a module of this package with add_options(parser, environment) and run(arguments)."""

_ELSEWHERE = {"quantize": "anychip.compress.command"}
"""Modules of commands that load torch into their own process, which this package does not."""

IN_EXTRAS = {"conformance": "conformance", "new-plugin": "conformance", "diff-numerics": "conformance"}
"""Commands that packages of ours contribute, and the extra that brings each."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for the user's errors, 1 for others."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = CommandParser(prog="anychip", description="Serve large language models on any accelerator.")
    parser.add_argument("--version", action="version", version=f"anychip {anychip.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        environment = Environment.read()
        for name, summary in COMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if name in argv[:1]:  # the others' modules stay unread: `devices` needs no web server
                module = import_module(_ELSEWHERE.get(name, f"anychip.entrypoints.cli.{name.replace('-', '_')}"))
                module.add_options(command, environment)
                command.set_defaults(run=module.run)
        if argv[:1] and argv[0] not in COMMANDS:  # --help too lists what other packages bring
            add_contributed(commands, argv[0])
        configure_logging(environment)
        arguments = parser.parse_args(argv)
        status: int = arguments.run(arguments)
    except UserError as error:
        print(f"anychip: {error}", file=sys.stderr)
        return 2
    except AnychipError as error:
        return _reported(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        named = blamed(error)
        if named is None:
            raise
        return _reported(named)
    return status


def _reported(error: AnychipError) -> int:
    print(f"anychip: {type(error).__name__}: {error}", file=sys.stderr)
    return 1


def add_contributed(commands: Any, asked: str) -> None:
    """Adds the commands of installed packages. Raises ConfigError for one of ours whose package is not there."""
    contributed = load_plugins().commands
    if asked in IN_EXTRAS and asked not in contributed:
        raise ConfigError(f'`anychip {asked}` is not installed; pip install "anychip[{IN_EXTRAS[asked]}]"')
    for name, manifest in contributed.items():
        command = commands.add_parser(name, help=manifest.summary, description=manifest.summary)
        if name == asked:
            add_options, run = (imported(f"{manifest.module}:{part}") for part in ("add_options", "run"))
            add_options(command)
            command.set_defaults(run=run)


if __name__ == "__main__":
    sys.exit(main())
