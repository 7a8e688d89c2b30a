"""Serves from the wheels alone: an empty environment, `anychip[cpu]` out of a folder of wheels, one chat completion.

python tools/try_wheels.py dist [--torch torch==2.13.0]

Other packages come from the index that pip is set up for. No path leads into the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

_READY_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0", help="what is installed first, as a plugin's users would")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        run([sys.executable, "-m", "venv", python.parent.parent], folder)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--find-links", arguments.wheels.resolve(), arguments.torch, "anychip[cpu]"], folder)
        where = run(
            [python, "-c", "import anychip, anychip_cpu; print(anychip.__file__, anychip_cpu.__file__)"], folder
        )
        assert all(place.startswith(folder) for place in where.split()), f"not from the wheels: {where}"
        reply = chat(python.parent / "anychip", folder)
    sys.stdout.write(f"served from wheels; the model answered {reply!r}\n")


def run(command: list[object], folder: str) -> str:
    """In a folder outside the repository, with nothing of ours on the path."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def chat(command: Path, folder: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [command, "serve", "quickstart", "--port", str(port)], cwd=folder, env=clean_environment()
    )
    try:
        wait_until_healthy(port, server)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert answer["usage"]["completion_tokens"] > 0, answer
        return str(answer["choices"][0]["message"]["content"])
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def wait_until_healthy(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(_READY_S * 10):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server ended instead of becoming ready") from None
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"the server was not ready after {_READY_S} s")


if __name__ == "__main__":
    main()
