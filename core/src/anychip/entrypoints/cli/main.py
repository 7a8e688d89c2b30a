"""Entry of the `anychip` command. Errors that the user can mend end with one line and status 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

import anychip
from anychip.config import Environment
from anychip.errors import AnychipError, UserError

COMMANDS = {
    "serve": "serve a model over HTTP with OpenAI's API",
    "generate": "continue a text",
    "chat": "talk to a model in the terminal",
    "plan": "say how much memory a model would take, before it is loaded",
    "bench": "measure throughput, latency, start-up, or a server under load",
    "devices": "list installed devices, and why others cannot run",
    "doctor": "explain which device is chosen, and what is wrong with the others",
}
"""Each is a module of this package with add_options(parser, environment) and run(arguments)."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for the user's errors, 1 for others."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="anychip", description="Serve large language models on any accelerator.")
    parser.add_argument("--version", action="version", version=f"anychip {anychip.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        environment = Environment.read()
        for name, summary in COMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if name in argv[:1]:  # the others' modules stay unread: `devices` needs no web server
                module = import_module(f"anychip.entrypoints.cli.{name}")
                module.add_options(command, environment)
                command.set_defaults(run=module.run)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)  # libraries: warnings
        logging.getLogger("anychip").setLevel(environment.log_level.upper())
        arguments = parser.parse_args(argv)
        status: int = arguments.run(arguments)
    except UserError as error:
        print(f"anychip: {error}", file=sys.stderr)
        return 2
    except AnychipError as error:
        print(f"anychip: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
