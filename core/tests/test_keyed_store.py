"""Torch's process groups over the store of several hosts."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch

from anychip.keyed_sockets import ClusterKey, KeyedContext
from anychip.launch.hosts.control import Hosts
from anychip.ops.reference.keyed_store import KeyedStore
from anychip.plugin_api import GroupSpec, Unsupported
from anychip_cpu.communicator import GlooCommunicator


@pytest.fixture
def hosts(tmp_path):
    """The engine's side, and the key's file beside it."""
    context = KeyedContext("127.0.0.1")
    opened = Hosts(context, ClusterKey.new(), ("a",), None, "anychip")
    (tmp_path / "key").write_text(opened.key.text)
    yield opened
    opened.close()
    context.close()


def address(hosts: Hosts) -> str:
    return hosts.store.removeprefix("tcp://")


def test_values_are_there_for_every_rank_and_a_missing_one_is_named(hosts):
    one, two = (KeyedStore(address(hosts), hosts.key, timedelta(seconds=0.3)) for _ in range(2))
    one.set("a/b", b"\x00\xff")
    assert two.get("a/b") == b"\x00\xff"
    assert (one.add("n", 2), two.add("n", 3)) == (2, 5)
    assert two.check(["a/b", "n"]) and not two.check(["a/b", "none"])
    assert one.delete_key("a/b") and not two.delete_key("a/b")
    with pytest.raises(RuntimeError, match="a rank has not come within 0 s: nobody has set none"):
        one.wait(["n", "none"])


def test_a_value_that_comes_late_is_waited_for(hosts):
    one, two = (KeyedStore(address(hosts), hosts.key, timedelta(seconds=20)) for _ in range(2))
    late = threading.Timer(0.3, lambda: two.set("late", b"here"))
    late.start()
    assert one.get("late") == b"here"


def test_ranks_meet_there_and_sum(hosts, tmp_path):
    sums: dict[int, list[float]] = {}

    def run(rank: int) -> None:
        spec = GroupSpec(
            ranks=(0, 1, 2), rank=rank, purpose="tp", max_message_bytes=64,
            store=f"keyed://{address(hosts)}?{tmp_path}/key", timeout_s=30.0,
        )  # fmt: skip
        sums[rank] = GlooCommunicator(spec).all_reduce(torch.full((2,), float(10**rank))).tolist()

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    assert sums == {rank: [111.0, 111.0] for rank in range(3)}


def test_a_store_of_an_unknown_kind_is_refused():
    spec = GroupSpec(ranks=(0, 1), rank=0, purpose="tp", max_message_bytes=64, store="smoke://x", timeout_s=1.0)
    with pytest.raises(Unsupported, match="known are file://, tcp:// and keyed://"):
        GlooCommunicator(spec)
