"""What cannot be read of a command line is said in one line with a remedy; every option has a row in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anychip.config import EngineConfig
from anychip.entrypoints.cli import chat, generate, plan, run_batch, serve, simulate
from anychip.entrypoints.cli.main import main
from anychip.entrypoints.cli.parser import CommandParser
from anychip.environment import Environment
from anychip.errors import ConfigError
from anychip.server_config import ServerConfig

REFERENCE = Path(__file__).parents[3] / "docs/reference/cli.md"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("plan --data-paralel-size 2", "unknown --data-paralel-size: did you mean --data-parallel-size?"),
        ("plan --adapter-target=head,x --zzz", "unknown --zzz; `anychip plan --help`"),
        ("generate --speculation mtp", "unknown --speculation: did you mean --speculate?"),
        ("bench serve --rat=3 --ratee=3", "unknown --ratee=3: did you mean --rate?; `anychip bench serve --help`"),
        ("plan a b c", "unknown b, c; `anychip plan --help`"),
        ("plan --max-num-seqs many", "argument --max-num-seqs: invalid int value: 'many'; `anychip plan --help`"),
        ("plan --load-format pickle", "invalid choice: 'pickle' (choose from"),
        ("simulate m", "the following arguments are required: --accelerator; `anychip simulate --help`"),
        ("bench", "the following arguments are required: KIND; `anychip bench --help`"),
        ("surve", "invalid choice: 'surve' (choose from"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_a_remedy(line, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert said in printed
    assert printed.startswith("anychip: ") and printed.count("\n") == 1


def options_of(module) -> set[str]:
    parser = CommandParser()
    module.add_options(parser, Environment())
    return set(re.findall(r"^ {2,}(--[a-z][\w-]*)", parser.format_help(), re.MULTILINE)) - {"--help"}


@pytest.mark.parametrize(
    "module", [serve, generate, chat, plan, run_batch, simulate], ids=lambda module: module.__name__
)
def test_every_option_is_in_the_reference(module):
    options = options_of(module)
    assert len(options) > 10
    missing = {option for option in options if f"`{option}" not in REFERENCE.read_text()}
    assert not missing


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"adapter_targets": ("head",)},
            "adapter_targets does nothing alone; give adapters, or max_adapters beside it",
        ),
        ({"max_adapter_rank": 8}, "max_adapter_rank does nothing alone; give adapters, or max_adapters"),
        ({"cluster_key": "file"}, "cluster_key does nothing alone; give nodes beside it, or leave it out"),
    ],
)
def test_a_setting_of_what_is_not_asked_for_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**settings)


def test_a_folder_of_adapters_takes_the_port_that_reads_it():
    with pytest.raises(ConfigError, match="--adapter-folder is read by the admin port alone; give an --admin-port"):
        ServerConfig(adapter_folder="folder")


def test_settings_of_what_is_asked_for_are_taken():
    EngineConfig(adapter_targets=("head",), max_adapters=2, max_adapter_rank=8)
    EngineConfig(adapter_targets=("head",), adapters={"a": "folder"})
    assert EngineConfig(max_drafts=4).max_drafts == 4, "a bound does no harm where nothing is bounded"
