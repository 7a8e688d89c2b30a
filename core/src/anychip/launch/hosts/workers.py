"""An engine whose workers run on several hosts: chooses ranks and devices, and starts the executor over them."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from anychip.config import EngineConfig
from anychip.errors import ConfigError, DeviceUnavailable
from anychip.executor.links import KeyedLinks
from anychip.executor.multiprocess import MultiprocessExecutor
from anychip.executor.progress import Progress
from anychip.keyed_sockets import ClusterKey, KeyedContext
from anychip.launch.child import Child
from anychip.launch.folder import private_folder
from anychip.launch.hosts.control import Hosts, RemoteWorker
from anychip.launch.hosts.messages import AgentSpec, HostProbed
from anychip.launch.worker_spec import worker_spec
from anychip.plugin_api.manifest import PlatformManifest, ProbeResult
from anychip.process_specs import WorkerLink
from anychip.registry.devices import (
    Candidate,
    ChosenDevice,
    choose_device,
    for_one_host,
    named_manifest,
    negotiated,
    one_process,
    parsed_options,
)
from anychip.registry.plugins import Plugins


class Agents(Protocol):
    """Whoever brings agents onto hosts."""

    address: str
    """Of this host, where the agents find the engine."""
    names: tuple[str, ...]
    """Of the agents."""
    workers_each: int
    """Ranks of each agent."""
    remedy: str
    """What to do where one does not come."""

    def bring(self, endpoint: str, key: ClusterKey) -> None: ...
    def lost(self) -> str:
        """The cause when one is known to be gone; "" otherwise."""
        ...

    def close(self) -> None: ...


class NodeAgents:
    """People start the others; this host's own is a child of the engine."""

    def __init__(self, config: EngineConfig) -> None:
        self.names = config.nodes
        self.workers_each = config.parallel_sizes.num_ranks // len(config.nodes)
        try:
            self.address = str(socket.getaddrinfo(config.nodes[0], None)[0][4][0])
        except OSError as error:
            raise ConfigError(f"node {config.nodes[0]!r} is no host: {error}; name this host first") from error
        self.remedy = (
            f"run on each: anychip join {self.address}:{config.node_port} --cluster-key FILE --as NAME, "
            "with NAME as in --nodes"
        )
        self._child: Child | None = None
        self._folder = private_folder()

    def bring(self, endpoint: str, key: ClusterKey) -> None:
        spec = AgentSpec(address=endpoint, name=self.names[0], key=key.text, folder=self._folder.name)
        self._child = Child("anychip.launch.hosts.agent", spec)

    def lost(self) -> str:
        code = None if self._child is None else self._child.exit_code()
        return "" if code is None else f"the agent of host {self.names[0]} exited with status {code}"

    def close(self) -> None:
        if self._child is not None:
            self._child.stop(0.0)
        self._folder.cleanup()


@dataclass(frozen=True, slots=True)
class _Place:
    """Of one rank: an agent, and the device there."""

    agent: str
    index: int


class HostedWorkers:
    """Agents have joined and said what they have; `start` starts the workers. Closed with the executor."""

    def __init__(
        self, config: EngineConfig, manifest: PlatformManifest, agents: Agents, key: ClusterKey, progress: Progress
    ) -> None:
        self._agents = agents
        self._progress = progress
        self._context = KeyedContext(agents.address)
        try:
            port = config.node_port if config.nodes else None
            self._hosts = Hosts(self._context, key, agents.names, port, manifest.package, agents.lost)
        except BaseException:
            self._context.close()
            agents.close()
            raise
        try:
            progress.start_got_on("the agents of the hosts are started")
            agents.bring(self._hosts.address, key)
            limit_s, got_on = config.start_timeout_s, progress.start_got_on
            self._hosts.await_all(limit_s, got_on, agents.remedy)
            self._found = self._hosts.probe(manifest.name, limit_s, got_on)
            self._places = self._choose_places()
            self.chosen = self._choose(config, manifest)
        except BaseException:
            self.close()
            raise

    def _choose_places(self) -> list[_Place]:
        """Ranks of one machine are neighbours: those that share a layer talk most."""
        machines = {name: self._found[name].machine for name in self._agents.names}
        first = {machine: at for at, machine in reversed(list(enumerate(machines.values())))}
        places = []
        for name in sorted(self._agents.names, key=lambda name: first[machines[name]]):
            indexes = [device.index for device in _probe(self._found[name]).devices]
            if len(indexes) < self._agents.workers_each:
                raise DeviceUnavailable(
                    f"host {name} has {len(indexes)} devices, and its share of the ranks is {self._agents.workers_each}"
                )
            places += [_Place(name, index) for index in indexes[: self._agents.workers_each]]
        return places

    def _choose(self, config: EngineConfig, manifest: PlatformManifest) -> ChosenDevice:
        probe = _probe(self._found[self._places[0].agent])
        decision = negotiated(manifest, config, probe)
        if one_process(manifest, decision):
            raise ConfigError(
                f"{manifest.name} drives all devices of a host from one process, which cannot be spread over hosts yet"
            )
        if decision.refuse:
            raise ConfigError(f"{manifest.package} refuses this configuration: " + "; ".join(decision.refuse))
        return ChosenDevice(
            candidate=Candidate(manifest=manifest, probe=probe, requirements=()),
            indexes=tuple(place.index for place in self._places),
            options=parsed_options(manifest, config.device_options),
            reason=f"on {', '.join(dict.fromkeys(place.agent for place in self._places))}",
            decision=decision,
        )

    def start(self, config: EngineConfig, folder: Path) -> MultiprocessExecutor:
        """Starts a worker for each rank; `config` is complete."""
        machines = [self._found[place.agent].machine for place in self._places]
        num_places = Counter(machines)

        def start(rank: int, link: WorkerLink) -> RemoteWorker:
            place, machine = self._places[rank], machines[rank]
            spec = msgspec.structs.replace(
                worker_spec(config, self.chosen, folder, rank),
                link=link,
                store=self._hosts.store.replace("tcp://", "keyed://"),
                probe=self._found[place.agent].probe,
            )
            return self._hosts.start(
                place.agent, spec, place=machines[:rank].count(machine), num_places=num_places[machine]
            )

        return MultiprocessExecutor(
            links=_HostLinks(self._context, self._hosts.key, self),
            world_size=len(self._places),
            start=start,
            progress=self._progress,
            peers_timeout_s=config.timeout_s,
            num_lanes=config.data_parallel_size,
        )

    def close(self) -> None:
        self._hosts.close()
        self._agents.close()
        self._context.close()


class _HostLinks(KeyedLinks):
    """Closes the hosts with the executor's sockets."""

    def __init__(self, context: KeyedContext, key: ClusterKey, workers: HostedWorkers) -> None:
        super().__init__(context, key)
        self._workers = workers

    def close(self) -> None:
        self._workers.close()


def open_hosted(config: EngineConfig, plugins: Plugins, progress: Progress) -> HostedWorkers | None:
    """None where the workers run on this host alone. Raises UserError for what the user can mend."""
    if config.executor == "ray":
        from anychip.launch.hosts.on_ray import RayAgents  # ray is an optional dependency

        if config.device == "auto":
            raise ConfigError(
                "executor ray places workers on hosts whose devices are not known here; name one with --device"
            )
        manifest = _manifest(config, plugins)
        return HostedWorkers(config, manifest, RayAgents(config, manifest), ClusterKey.new(), progress)
    if not config.nodes:
        return None
    assert config.cluster_key is not None, "the configuration asks for it"
    key = ClusterKey.of_file(config.cluster_key)
    return HostedWorkers(config, _manifest(config, plugins), NodeAgents(config), key, progress)


def ray_resource_of(config: EngineConfig, plugins: Plugins) -> str:
    """What Ray calls the devices of a configuration. Raises DeviceUnavailable where no plugin brings them."""
    return _manifest(config, plugins).ray_resource or "CPU"


def _manifest(config: EngineConfig, plugins: Plugins) -> PlatformManifest:
    """The platform of all ranks. "auto" is what this host would choose for its share."""
    name, _, index = config.device.partition(":")
    if index:
        raise ConfigError(f"device {config.device!r}: hosts choose their devices themselves; give {name!r} alone")
    if name == "auto":
        return choose_device(for_one_host(config), plugins).manifest
    return named_manifest(name, plugins)


def _probe(found: HostProbed) -> ProbeResult:
    return msgspec.convert(found.probe, ProbeResult)
