"""The commands' exit status, what they print, and that a refusal is one line with cause and remedy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def anychip(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anychip.entrypoints.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_devices_explains_all_five_plugins():
    done = anychip("devices", "--json")
    assert done.returncode == 0, done.stderr
    found = {device["name"]: device for device in json.loads(done.stdout)["devices"]}
    assert set(found) >= {"cpu", "cuda", "rocm", "tpu", "ascend", "fake-static", "fake-hostlen", "fake-spmd"}
    assert found["cpu"]["usable"]
    for name in ("cuda", "rocm", "tpu", "ascend"):
        assert found[name]["usable"] or (found[name]["problems"] and found[name]["remedy"])


def test_devices_prints_every_name_and_remedy():
    text = " ".join(anychip("devices").stdout.split())
    for name in ("cpu", "cuda", "rocm", "tpu", "ascend"):
        assert f"anychip-{name}" in text


def test_doctor_says_what_is_chosen_and_why_not_the_others(tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    done = anychip("doctor", "--hot-path", HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chosen: first by --device auto" in done.stdout
    assert "softcap: reference" in done.stdout
    assert "remedy: " in done.stdout
    assert sorted(tmp_path.rglob("*")) == before, "doctor writes nothing"


def test_doctor_of_a_device_that_is_not_here_ends_with_status_2():
    done = anychip("doctor", "--device", "rocm:3")
    assert done.returncode == 2
    assert "device 'rocm' cannot start" in done.stdout


def test_generate_writes_text():
    done = anychip("generate", "--prompt", "import numpy as", "--max-tokens", "3", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_chat_answers_until_an_empty_line():
    done = subprocess.run(
        [sys.executable, "-m", "anychip.entrypoints.cli.main", "chat", "--max-tokens", "5"],
        input="Hello\n\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") >= 2


REFUSED = [
    (("--device", "cuda"), "device 'cuda' cannot start"),
    (("--device", "tpux"), "device 'tpux' is unknown; installed are"),
    (("--device", "cpu:99"), "cpu has devices 0, 1"),
    (
        ("--device", "cpu", "--device-opt", "thread=1"),
        "no such option; it has graphs, isa, kv_cache_gib, packed_weights, packed_weights_gib, threads",
    ),
    (("--device", "cpu", "--device-opt", "threads"), "is not KEY=VALUE"),
    (("/nowhere",), "model '/nowhere' is not a folder"),
    (("--dtype", "float7"), "dtype is 'float7'"),
    (("--device", "cpu", "--max-model-len", "2048", "--num-kv-blocks", "9"), "8 fit; lower --max-model-len to 128"),
    (("--device", "cpu", "--policy", "lottery"), "policy 'lottery' does not exist"),
    (("--device", "cpu", "--require-native"), "--require-native: no override of"),
]

IN_ONE_PROCESS = """
import contextlib, io, json, sys
from anychip.entrypoints.cli.main import main

for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status = main(["generate", "--prompt", "x", *arguments])
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def refusals() -> list[tuple[int, str]]:
    """Status and stderr of each; one process says them all, for each would load torch again."""
    command = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps([arguments for arguments, _ in REFUSED])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=lambda index: " ".join(REFUSED[index][0]))
def test_a_refusal_is_a_line_with_cause_and_remedy(index, refusals):
    status, said = refusals[index]
    assert status in (1, 2)
    assert REFUSED[index][1] in said
    assert "Traceback" not in said
    assert said.count("\n") == 1


def test_a_refusal_ends_the_process_with_its_status():
    done = anychip("generate", "--prompt", "x", "--device", "tpux")
    assert done.returncode == 2
    assert "device 'tpux' is unknown; installed are" in done.stderr and done.stderr.count("\n") == 1


def test_an_engine_that_cannot_start_ends_serve_with_its_cause():
    done = anychip(
        "serve", "quickstart", "--device", "cpu", "--port", "0", "--max-model-len", "2048", "--num-kv-blocks", "9"
    )
    assert done.returncode == 2
    assert "8 fit; lower --max-model-len to 128" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = anychip("serve", "quickstart", "--port", str(port))
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 is in use; choose another with --port" in done.stderr


def test_an_unknown_variable_is_refused():
    done = anychip("devices", ANYCHIP_DEVIEC="cpu")
    assert done.returncode == 2
    assert "unknown variable ANYCHIP_DEVIEC" in done.stderr


def test_a_temporary_folder_too_deep_for_sockets_is_said(tmp_path: Path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    done = anychip("generate", "--prompt", "x", TMPDIR=str(deep))
    assert done.returncode == 2
    assert "set TMPDIR to a shorter path" in done.stderr
    assert not list(deep.iterdir())
