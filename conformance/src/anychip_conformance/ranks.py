"""Real processes as the ranks of a group: each opens the device and runs its part of a collective case.

`python -m anychip_conformance.ranks DEVICE OPTIONS RANK FD` is one of them; `RankPool` is who starts and asks them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import msgspec

from anychip.config import EngineConfig
from anychip.plugin_api import Communicator, GroupSpec, Mesh, Placement, Unsupported
from anychip_conformance.collectives import CHECKS, CollectiveCase, Member
from anychip_conformance.device import Device, open_device
from anychip_conformance.run import described
from anychip_conformance.verdicts import Refused

_TIMEOUT_S = 30.0
_MAX_MESSAGE = 1 << 20


class RankTask(msgspec.Struct, frozen=True, kw_only=True):
    """`store` is where the case's group meets, and names it: its communicator is made once."""

    case: CollectiveCase
    store: str


class RankAnswer(msgspec.Struct, frozen=True, kw_only=True):
    error: str = ""
    refused: str = ""
    """Why the platform serves no group along an axis of the case's mesh."""
    digest: bytes = b""


class RankPool:
    """`size` processes, each with a device of its own. They live as long as the judged process."""

    def __init__(self, device: Device, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="anychip-ranks-")
        self._ranks = [RankProcess(device, rank, size) for rank in range(size)]
        self._stores: dict[tuple[object, ...], str] = {}

    def run(self, case: CollectiveCase) -> None:
        """Raises AssertionError with what the ranks reported, and Refused where all refuse an axis."""
        group = (case.members, tuple(case.axes.items()), case.joined)
        store = self._stores.setdefault(group, f"file://{Path(self._folder.name) / uuid.uuid4().hex}")
        task = RankTask(case=case, store=store)
        members = [self._ranks[rank] for rank in case.members]
        for rank in members:
            rank.tell(task)
        answers = [rank.answer() for rank in members]
        if all(answer.refused for answer in answers):
            raise Refused("", answers[0].refused)
        said = [answer.error or answer.refused for answer in answers]
        errors = [f"rank {rank}: {text}" for rank, text in zip(case.members, said, strict=True) if text]
        assert not errors, "; ".join(errors)
        assert len({answer.digest for answer in answers}) == 1, "members of the group got different bits"

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._folder.cleanup()


class RankProcess:
    def __init__(self, device: Device, rank: int, size: int) -> None:
        config = EngineConfig(device=device.name, device_options=dict(device.options), tensor_parallel_size=size)
        indexes = [found.index for found in device.probe.devices]
        placement = Placement(rank=rank, world_size=size, device_indexes=(indexes[rank % len(indexes)],))
        readable, writable = os.pipe()
        opening = [device.name, msgspec.json.encode(dict(device.options)).decode(), str(rank), str(writable)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "anychip_conformance.ranks", *opening],
            stdin=subprocess.PIPE,
            pass_fds=(writable,),
            env={**os.environ, **device.manifest.worker_env(config, placement)},
        )
        os.close(writable)
        self._answers = os.fdopen(readable, "rb")

    def tell(self, task: RankTask) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(msgspec.json.encode(task) + b"\n")
            self._child.stdin.flush()

    def answer(self) -> RankAnswer:
        line = self._answers.readline()
        if not line:
            return RankAnswer(error=f"the process ended with status {self._child.wait()}")
        return msgspec.json.decode(line, type=RankAnswer)

    def close(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._answers.close()


def main(name: str, options: str, rank: int, answers_fd: int) -> None:
    device = open_device(name, msgspec.json.decode(options), index=rank)
    groups: dict[str, Communicator] = {}
    meshes: dict[str, Mesh] = {}
    with os.fdopen(answers_fd, "wb", buffering=0) as answers:
        for line in sys.stdin.buffer:
            task = msgspec.json.decode(line, type=RankTask)
            try:
                if task.case.axes:
                    mesh = meshes.setdefault(task.store, mesh_of(device, task, rank))
                    member = Member(device, Communicator(group_of(alone(rank), rank, "")), task.case, mesh)
                else:
                    if task.store not in groups:
                        groups[task.store] = device.platform.communicator(group_of(task.case, rank, task.store))
                    member = Member(device, groups[task.store], task.case)
                answer = RankAnswer(digest=CHECKS[task.case.name](member))
            except Unsupported as refusal:
                answer = RankAnswer(refused=str(refusal)) if task.case.axes else RankAnswer(error=described(refusal))
            except Exception as error:  # noqa: BLE001 - a plugin may raise anything
                answer = RankAnswer(error=described(error))
            answers.write(msgspec.json.encode(answer) + b"\n")
    for communicator in (*groups.values(), *(each for mesh in meshes.values() for each in mesh.opened)):
        communicator.close()
    device.close()


def alone(rank: int) -> CollectiveCase:
    """A group of one rank."""
    return CollectiveCase(name="all_reduce", world=rank + 1, members=(rank,))


def mesh_of(device: Device, task: RankTask, rank: int) -> Mesh:
    return Mesh(
        task.case.mesh,
        rank,
        device.platform.communicator,
        max_message_bytes=_MAX_MESSAGE,
        store=task.store,
        timeout_s=_TIMEOUT_S,
    )


def group_of(case: CollectiveCase, rank: int, store: str) -> GroupSpec:
    return GroupSpec(
        ranks=case.members, rank=rank, purpose="tp", max_message_bytes=_MAX_MESSAGE, store=store, timeout_s=_TIMEOUT_S
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
