"""`anychip join`: makes this host one of the --nodes of a server on another."""

from __future__ import annotations

import argparse
import signal
import socket

from anychip.environment import Environment
from anychip.errors import ConfigError
from anychip.keyed_sockets import ClusterKey
from anychip.launch.folder import private_folder
from anychip.launch.hosts.agent import HostAgent


def add_options(parser: argparse.ArgumentParser, environment: Environment) -> None:
    parser.add_argument("address", metavar="HOST:PORT", help="the server's first node and its --node-port")
    parser.add_argument("--cluster-key", required=True, metavar="FILE", help="the secret that all nodes have")
    parser.add_argument(
        "--as", dest="name", default=socket.gethostname(), help="this host, as --nodes names it (default: its name)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Until a signal: engines that are started again find this host waiting. Raises ConfigError when one refuses it."""
    host, _, port = arguments.address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"the address is {arguments.address!r}; expected HOST:PORT, such as 10.0.0.1:7345")
    with private_folder() as folder:
        key = ClusterKey.of_file(arguments.cluster_key)
        agent = HostAgent(f"tcp://{arguments.address}", key, arguments.name, folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: agent.stop())
        agent.run()
    return 0
