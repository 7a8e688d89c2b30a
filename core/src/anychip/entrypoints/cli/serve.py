"""`anychip serve`: the OpenAI server."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from anychip.config import Environment
from anychip.entrypoints.cli.options import add_engine_options, engine_config
from anychip.entrypoints.openai.server import serve
from anychip.launch.async_llm import AsyncLLM
from anychip.messages import MemoryPlan, WorkerReady


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    add_engine_options(parser, environment)
    http = parser.add_argument_group("http")
    http.add_argument("--host", default="127.0.0.1")
    http.add_argument("--port", type=int, default=8000)
    http.add_argument("--api-key", default=environment.api_key, help="asked for on /v1; also ANYCHIP_API_KEY")


def run(arguments: argparse.Namespace) -> int:
    serve(
        engine_config(arguments),
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key,
        announce=announce,
    )
    return 0


def announce(llm: AsyncLLM, worker: WorkerReady, url: str, seconds: float) -> None:
    """What was started and where, with a line to try."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold]anychip[/] serves [bold]{escape(llm.config.public_name)}[/] on {worker.device}")
    for line in memory_lines(worker.memory, llm.max_model_len):
        console.print(f"  {line}")
    for note in worker.notes:
        console.print(f"  {escape(note)}")
    console.print(f"ready in {seconds:.1f} s: [bold]{url}/v1[/]\n")
    body = '{"messages": [{"role": "user", "content": "How do I reverse a list?"}], "max_tokens": 64}'
    console.print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{escape(body)}'\n")


def memory_lines(memory: MemoryPlan, max_model_len: int) -> list[str]:
    """The memory plan, as people read it."""
    return [
        f"weights {size(memory.weights)}, activations {size(memory.activations)}, graphs {size(memory.graphs)}",
        f"KV cache {size(memory.kv_cache)}: {memory.num_blocks - 1} blocks, {memory.kv_tokens} tokens, "
        f"{memory.max_concurrency:.1f} requests of {max_model_len} tokens at once",
    ]


def size(nbytes: int) -> str:
    """Bytes in the unit that keeps them short."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"
