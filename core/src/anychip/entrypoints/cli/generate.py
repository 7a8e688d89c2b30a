"""`anychip generate`: the engine in this process, tokens to the terminal as they come."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from anychip.engine.outputs import RequestOutput
from anychip.entrypoints.cli.options import add_engine_options, engine_config
from anychip.environment import Environment
from anychip.launch.llm import LLM
from anychip.sampling_params import SamplingParams


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    add_engine_options(parser, environment)
    add_sampling_options(parser)
    parser.add_argument("--prompt", help="the text (default: standard input)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=256)
    sampling.add_argument("--temperature", type=float, default=argparse.SUPPRESS, help="default: the model's")
    sampling.add_argument("--top-p", type=float, default=argparse.SUPPRESS, help="default: the model's")


def run(arguments: argparse.Namespace) -> int:
    prompt = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
    with open_llm(arguments) as llm:
        print_outputs(llm.stream(prompt, sampling_params(llm, arguments)))
    return 0


def open_llm(arguments: argparse.Namespace) -> LLM:
    return LLM.from_config(engine_config(arguments))


def sampling_params(llm: LLM, arguments: argparse.Namespace) -> SamplingParams:
    given = {name: value for name, value in vars(arguments).items() if name in ("max_tokens", "temperature", "top_p")}
    return llm.default_sampling(**given)


def print_outputs(outputs: Iterator[RequestOutput]) -> str:
    """Prints pieces as they come; returns the whole text."""
    text = ""
    for output in outputs:
        for piece in output.outputs:
            print(piece.text, end="", flush=True)
            text += piece.text
    print()
    return text
