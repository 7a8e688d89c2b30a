"""`anychip serve`: the OpenAI server."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape

from anychip.entrypoints.cli.options import add_engine_options, engine_config, parse_count
from anychip.entrypoints.http.server import serve
from anychip.environment import Environment
from anychip.first_model import first_model
from anychip.launch.async_llm import AsyncLLM
from anychip.server_config import ServerConfig
from anychip.tasks.served import Task
from anychip.worker_report import MemoryPlan, WorkerReady


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    """Every option's destination is a field of EngineConfig or ServerConfig; unset ones keep its default."""
    add_engine_options(parser, environment)
    parser.set_defaults(model=None)
    unset = argparse.SUPPRESS
    http = parser.add_argument_group("http")
    http.add_argument("--host", default=unset)
    http.add_argument("--port", type=int, default=unset)
    http.add_argument("--uds", default=unset, metavar="PATH", help="a Unix socket instead of host and port")
    http.add_argument("--tls-cert", default=unset, metavar="FILE")
    http.add_argument("--tls-key", default=unset, metavar="FILE")
    http.add_argument("--cors-origin", dest="cors_origins", action="append", default=unset, metavar="ORIGIN")
    http.add_argument("--max-body", dest="max_body_bytes", type=parse_count, default=unset, metavar="BYTES")
    http.add_argument("--lenient", action="store_true", default=unset, help="ignore unknown parameters, with a warning")
    http.add_argument("--no-ui", dest="ui", action="store_false", default=unset, help="no page at /")
    keys = parser.add_argument_group("keys")
    keys.add_argument("--api-key", default=environment.api_key, help="asked for by every API; also ANYCHIP_API_KEY")
    keys.add_argument("--api-keys", default=unset, metavar="FILE", help="several, hashed: `anychip hash-key`")
    keys.add_argument("--key-concurrency", type=int, default=unset, help="requests that one key may have open")
    keys.add_argument("--admin-port", type=int, default=unset)
    keys.add_argument(
        "--adapter-folder", default=unset, metavar="FOLDER", help="where the admin port may load adapters from"
    )
    keys.add_argument("--admin-key", default=environment.admin_key, help="also ANYCHIP_ADMIN_KEY")
    chat = parser.add_argument_group("chat")
    chat.add_argument("--chat-template", default=unset, metavar="FILE", help="instead of the checkpoint's")
    chat.add_argument("--tool-parser", default=unset, help="auto, none, hermes, llama3_json, pythonic, mistral, ...")
    chat.add_argument("--reasoning-parser", default=unset, help="auto, none, think, mistral, harmony, ...")
    run_group = parser.add_argument_group("operation")
    run_group.add_argument("--max-waiting", type=int, default=unset, help="requests that may wait for a slot")
    run_group.add_argument("--max-waiting-tokens", type=parse_count, default=unset, help="of their prompts")
    run_group.add_argument("--max-queue-s", type=float, default=unset, help="refuse requests that would wait longer")
    run_group.add_argument("--request-timeout-s", type=float, default=unset)
    run_group.add_argument("--grammar-timeout-s", type=float, default=unset)
    run_group.add_argument("--ready-within-s", type=float, default=unset, help="/ready fails after such a silence")
    run_group.add_argument("--drain-s", type=float, default=unset, help="what SIGTERM leaves requests in flight")
    run_group.add_argument("--otel-endpoint", default=unset, metavar="URL", help="OTLP over HTTP, for traces")
    run_group.add_argument("--restarts", type=int, default=unset, help="of a dead engine, within ten minutes")


def run(arguments: argparse.Namespace) -> int:
    hint = None
    if arguments.model is None:
        first = first_model()
        arguments.model, hint = first.model, first.hint

    def announced(llm: AsyncLLM, worker: WorkerReady, url: str, seconds: float) -> None:
        announce(llm, worker, url, seconds, hint)

    serve(engine_config(arguments), server_config(arguments), announce=announced)
    return 0


def server_config(arguments: argparse.Namespace) -> ServerConfig:
    """Raises ConfigError."""
    values = {name: value for name, value in vars(arguments).items() if name in ServerConfig.__struct_fields__}
    if "cors_origins" in values:
        values["cors_origins"] = tuple(values["cors_origins"])
    return ServerConfig(**values)


_EXAMPLES: dict[Task, tuple[str, str]] = {
    "generate": (
        "/v1/chat/completions",
        '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64}',
    ),
    "embed": ("/v1/embeddings", '{"input": ["a cat", "a dog"]}'),
    "classify": ("/classify", '{"input": "I like it"}'),
    "score": ("/rerank", '{"query": "What purrs?", "documents": ["a cat", "a car"]}'),
    "reward": ("/pooling", '{"input": "I like it"}'),
}
"""By task: a route, and a body to try."""


def announce(llm: AsyncLLM, worker: WorkerReady, url: str, seconds: float, hint: str | None = None) -> None:
    """What was started and where, with a line to try."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold]anychip[/] serves [bold]{escape(llm.config.public_name)}[/] on {worker.device}")
    if not llm.served.draws:
        console.print(f"  task {llm.served.task}: {escape(llm.served.why)}")
    for line in memory_lines(worker.memory, llm.max_model_len):
        console.print(f"  {line}")
    for note in worker.notes:
        console.print(f"  {escape(note)}")
    if hint is not None:
        console.print(f"  {escape(hint)}")
    console.print(f"ready in {seconds:.1f} s: [bold]{url}/v1[/]\n")
    route, body = _EXAMPLES[llm.served.task]
    console.print(f"  curl {url}{route} -H 'Content-Type: application/json' -d '{escape(body)}'\n")


def memory_lines(memory: MemoryPlan, max_model_len: int) -> list[str]:
    """The memory plan, as people read it."""
    states = f"{memory.num_states - 1} states, " if memory.num_states else ""
    return [
        f"weights {size(memory.weights)}, activations {size(memory.activations)}, graphs {size(memory.graphs)}",
        f"KV cache {size(memory.kv_cache)}: {memory.num_blocks - 1} blocks, {memory.kv_tokens} tokens, "
        f"{states}{memory.max_concurrency:.1f} requests of {max_model_len} tokens at once",
    ]


def size(nbytes: int) -> str:
    """Bytes in the unit that keeps them short."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"
