"""A Ray Serve application of one model: every HTTP route of `anychip serve`, in replicas that Ray starts and ends.

`anychip.ray_serve:build` is the import path. Several models are several applications, each with a route of its own.
Needs `pip install "anychip[ray]"`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from starlette.types import ASGIApp

from anychip.config import EngineConfig
from anychip.entrypoints.http.app import make_app
from anychip.entrypoints.http.server import CLOSING_S, steady_interpreter
from anychip.errors import ConfigError, EngineDead
from anychip.launch.async_llm import AsyncLLM
from anychip.launch.hosts.workers import ray_resource_of
from anychip.registry.plugins import load_plugins
from anychip.server_config import ServerConfig

_MAX_ONGOING = 100_000
"""Requests that Ray hands to a replica at once. The engine's own queue decides, as it does without Ray."""

_LOOK_BACK_S = 30.0
"""Over which Serve averages what replicas report."""

_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus"}
"""Ray's own options for some resources; all others go by name."""


class Replicas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many replicas there are, and when. Times in seconds."""

    min: int = 1
    max: int = 1
    waiting_requests: float = 8.0
    """Requests that wait in a replica beyond which there is another one."""
    kv_usage: float = 0.8
    """Share of a replica's KV cache in use, likewise."""
    upscale_s: float = 10.0
    """For how long more must have been needed."""
    downscale_s: float = 300.0
    restart_s: float = 600.0
    """Without an engine that gives signs of life for so long, a replica is replaced: it replaces its engine itself."""

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ConfigError(f"replicas are min {self.min} and max {self.max}; expected 1 <= min <= max")
        if not self.waiting_requests > 0 or not 0 < self.kv_usage <= 1:
            raise ConfigError(
                f"replicas scale by waiting_requests {self.waiting_requests} and kv_usage {self.kv_usage}; "
                "expected above 0, and kv_usage up to 1"
            )


class AppConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `build` takes. `actor_options` are Ray's, of a replica; devices are added by the engine's configuration."""

    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()
    replicas: Replicas = Replicas()
    actor_options: dict[str, Any] = {}


def build(config: Mapping[str, Any]) -> serve.Application:
    """The application of a configuration, as Serve's config file has it under `args`. Raises ConfigError.

    Example:
        serve.run(build({"engine": {"model": "org/model", "device": "cuda"}, "replicas": {"max": 4}}))
    """
    try:
        read = msgspec.convert(dict(config), AppConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"anychip.ray_serve: {error}; expected engine, server, replicas, actor_options") from error
    replicas = read.replicas
    policy = AutoscalingPolicy(
        policy_function=QueueAndCache,
        policy_kwargs={"waiting_requests": replicas.waiting_requests, "kv_usage": replicas.kv_usage},
    )
    scaling = AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.max,
        upscale_delay_s=replicas.upscale_s,
        downscale_delay_s=replicas.downscale_s,
        look_back_period_s=_LOOK_BACK_S,
        policy=policy,
    )
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="anychip",
        autoscaling_config=scaling,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=read.server.drain_s + CLOSING_S,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options=actor_options(read),
    )
    return deployment.bind(msgspec.to_builtins(read))


def actor_options(config: AppConfig) -> dict[str, Any]:
    """Of a replica's process: its devices, unless Ray places the workers elsewhere. Raises DeviceUnavailable,
    ConfigError."""
    engine = config.engine
    if engine.nodes:
        raise ConfigError("nodes are for `anychip serve`; with Ray, give the engine executor ray")
    if engine.device == "auto":
        raise ConfigError("replicas run on hosts whose devices are not known here; give the engine a device by name")
    resource, amount = ray_resource_of(engine, load_plugins()), engine.parallel_sizes.num_ranks
    if engine.executor == "ray":  # its process is a driver of its own, of the same cluster
        cluster = {"env_vars": {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}} if ray.is_initialized() else {}
        return {"num_cpus": 0, "runtime_env": cluster, **config.actor_options}
    option = _OPTIONS.get(resource)
    devices: dict[str, Any] = {"resources": {resource: amount}} if option is None else {option: amount}
    return {**devices, **config.actor_options}


class QueueAndCache:
    """Serve's autoscaling policy: as many replicas as keep each below both limits. Serve applies the delays."""

    def __init__(self, waiting_requests: float, kv_usage: float) -> None:
        self._limits = {"waiting": waiting_requests, "kv_usage": kv_usage}

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        if not any(reported.get(name) for name in self._limits):
            return context.target_num_replicas, {}  # no figures yet: guesses would end replicas under load
        needed = (
            math.ceil(sum(reported.get(name, {}).values()) / limit - 1e-9) for name, limit in self._limits.items()
        )
        return max(1, *needed), {}


class Replica:
    """An engine and its HTTP application. Serve makes it, asks for its health, and lets its requests end before it ends
    it."""

    async def __init__(self, config: Mapping[str, Any]) -> None:  # type: ignore[misc]
        read = msgspec.convert(dict(config), AppConfig)
        self._config = read
        self._llm = AsyncLLM(read.engine, restarts=read.server.restarts, otel_endpoint=read.server.otel_endpoint)
        await self._llm.start()
        steady_interpreter()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self._llm, self._config.server)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What QueueAndCache sums up."""
        if self._llm.dead is not None:  # it holds nothing any more
            return {"waiting": 0.0, "kv_usage": 0.0}
        stats = self._llm.metrics.last
        return {"waiting": stats.waiting, "kv_usage": stats.kv_blocks_used / max(1, stats.kv_blocks)}

    async def check_health(self) -> None:
        """Raises EngineDead for a replica that does not get on, and cannot mend itself."""
        silent_s, allowed_s = self._llm.silent_s, self._config.replicas.restart_s
        if silent_s > allowed_s:
            raise EngineDead(f"the engine has given no sign of life for {silent_s:.0f} s, {allowed_s:.0f} may pass")

    async def __del__(self) -> None:
        await self._llm.abort_all()
        await self._llm.close()
