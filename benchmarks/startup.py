"""Seconds from `anychip serve` to the first healthy answer, and what the processes hold then.

python benchmarks/startup.py [--model MODEL] [--repeats 7] [--output benchmarks/results/startup.json]
"""

from __future__ import annotations

import argparse
import http.client
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import write


def start_once(model: str) -> dict[str, float]:
    """One start: seconds until /health answers 200, resident MiB of the API and the engine process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.perf_counter()
    server = subprocess.Popen(
        [Path(sys.executable).parent / "anychip", "serve", model, "--port", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.01)
            finally:
                connection.close()
            if server.poll() is not None:
                raise SystemExit("the server did not start")
        seconds = time.perf_counter() - began
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        return {"seconds": seconds, "api_mib": resident_mib(server.pid), "engine_mib": resident_mib(int(children[0]))}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} is gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    runs = [start_once(arguments.model) for _ in range(arguments.repeats)]
    seconds = sorted(run["seconds"] for run in runs)
    medians = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    print(f"{medians} over {len(runs)} starts, {seconds[0]:.2f} to {seconds[-1]:.2f} s")
    if arguments.output:
        write(
            arguments.output,
            {
                "benchmark": "startup",
                "command": f"python benchmarks/startup.py --model {arguments.model} --repeats {arguments.repeats}",
                "median": medians,
                "seconds": [round(value, 2) for value in seconds],
            },
        )


if __name__ == "__main__":
    main()
