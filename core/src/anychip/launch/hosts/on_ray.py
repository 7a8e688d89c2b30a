"""Agents on a Ray cluster. Ray places them, reserves their devices and notices their ends. Nothing of a step goes
through it."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from anychip.config import EngineConfig
from anychip.errors import ConfigError, DeviceUnavailable
from anychip.keyed_sockets import ClusterKey
from anychip.launch.hosts.agent import HostAgent
from anychip.plugin_api.manifest import PlatformManifest

_KNOWN = {"CPU": "num_cpus", "GPU": "num_gpus"}
"""Resources that have an argument of their own in Ray."""

_END_S = 5.0
"""What agents have to end by themselves."""


class RayAgents:
    """hosts.workers.Agents: one for each rank, with a device of its own. Connects to the cluster that RAY_ADDRESS or
    Ray's own files name, and starts one on this host where there is none. Raises ConfigError without Ray."""

    def __init__(self, config: EngineConfig, manifest: PlatformManifest) -> None:
        self._ray = _ray()
        self.names = tuple(f"rank-{index}" for index in range(config.parallel_sizes.num_ranks))
        self.workers_each = 1
        self.remedy = "`ray status` and the logs of its workers say more"
        self._resource = manifest.ray_resource or "CPU"
        self._limit_s = config.start_timeout_s
        self._owns_connection = not self._ray.is_initialized()
        if self._owns_connection:
            self._ray.init(include_dashboard=False, namespace="anychip")
        self.address = self._ray.util.get_node_ip_address()
        self._group: Any = None
        self._actors: list[Any] = []
        self._runs: list[Any] = []

    def bring(self, endpoint: str, key: ClusterKey) -> None:
        """Raises DeviceUnavailable where the cluster does not have the devices."""
        self._group = self._reserve(len(self.names))
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        agent = self._ray.remote(RayAgent)
        for index, name in enumerate(self.names):
            actor = agent.options(
                **self._demand(),
                scheduling_strategy=strategy(placement_group=self._group, placement_group_bundle_index=index),
            ).remote()
            self._actors.append(actor)
            self._runs.append(actor.run.remote(endpoint, key.text, name))

    def _reserve(self, count: int) -> Any:
        """A placement group with a device in each bundle, on as few nodes as hold them."""
        group = self._ray.util.placement_group([{self._resource: 1} for _ in range(count)], strategy="PACK")
        began = time.monotonic()
        have = self._ray.cluster_resources().get(self._resource, 0)
        limit_s = self._limit_s if have >= count else 0.0
        if not group.wait(limit_s):
            self._ray.util.remove_placement_group(group)
            free = self._ray.available_resources().get(self._resource, 0)
            raise DeviceUnavailable(
                f"Ray has {have:g} of resource {self._resource!r}, {free:g} of them free, and {count} are needed; "
                f"waited {time.monotonic() - began:.0f} s; add nodes, or lower --tensor-parallel-size"
            )
        return group

    def _demand(self) -> dict[str, Any]:
        """As an actor's options have it."""
        if self._resource in _KNOWN:
            return {"num_cpus": 0, _KNOWN[self._resource]: 1}
        return {"num_cpus": 0, "resources": {self._resource: 1}}

    def lost(self) -> str:
        ended, _ = self._ray.wait(self._runs, num_returns=len(self._runs), timeout=0) if self._runs else ([], [])
        for run in ended:
            name = self.names[self._runs.index(run)]
            try:
                self._ray.get(run)
            except Exception as error:  # noqa: BLE001 - whatever ended an actor
                return f"the agent of {name} on Ray is gone: {str(error).strip().splitlines()[0]}"
            return f"the agent of {name} on Ray has ended"
        return ""

    def close(self) -> None:
        if self._runs:  # they have been told that the engine ends, and tidy up
            self._ray.wait(self._runs, num_returns=len(self._runs), timeout=_END_S)
        for actor in self._actors:
            self._ray.kill(actor)
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        if self._owns_connection:
            self._ray.shutdown()


class RayAgent:
    """An actor: an agent in a process of Ray's, which sees the devices that Ray has reserved for it."""

    def run(self, endpoint: str, key: str, name: str) -> None:
        """Returns when the engine ends."""
        with tempfile.TemporaryDirectory(prefix="anychip-") as folder:
            HostAgent(endpoint, ClusterKey(key), name, folder).run_once()


def _ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError('executor ray needs Ray; pip install "anychip[ray]"') from error
    return ray
