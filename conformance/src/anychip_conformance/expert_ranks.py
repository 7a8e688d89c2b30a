"""What one rank does in a case of moe.dispatch: it holds two experts, and sends its tokens to those of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from anychip.plugin_api import ExpertParallel, MoESpec, Routing
from anychip_conformance.device import seen
from anychip_conformance.oracle import vectorised as oracle
from anychip_conformance.oracle.vectorised import Array, Bounded, Expert
from anychip_conformance.products import make_matrix, stream

if TYPE_CHECKING:
    from anychip_conformance.collectives import Member

_HELD, _TOP_K, _INTERMEDIATE = 2, 2, 24
_PADDED = 2
"""Tokens of each rank, the last ones, that are padding."""


def experts(member: Member) -> bytes:
    """The weighted outputs of every rank's own tokens; rank 1 has none but padding."""
    case, device, ranks = member.case, member.device, member.count
    spec = MoESpec(
        num_experts=_HELD * ranks,
        top_k=_TOP_K,
        hidden_size=case.width,
        intermediate_size=_INTERMEDIATE,
        dtype=case.dtype,  # type: ignore[arg-type]
        num_local_experts=_HELD,
    )
    kernel = device.platform.moe(spec)
    packed = kernel.begin()
    every = {}
    for expert in range(spec.num_experts):
        rng, matrices = np.random.default_rng((7, expert)), {}
        for part in ("gate", "up", "down"):
            shape = (case.width, _INTERMEDIATE) if part == "down" else (_INTERMEDIATE, case.width)
            matrices[part] = make_matrix(device, rng, *shape, case.dtype, None)
            if expert // _HELD == member.rank:
                stream(
                    matrices[part],
                    part,
                    lambda part, tensor, row=0, place=expert % _HELD: kernel.load(packed, place, part, tensor, row=row),
                )
        every[expert] = Expert(**{part: matrix.dense for part, matrix in matrices.items()})
    packed = kernel.finish(packed)
    ep = ExpertParallel(communicator=member.comm, num_local_experts=_HELD)
    x, weights, slots = _tokens(member)
    routing = Routing(device.tensor(weights, "float32"), device.tensor(slots, "int64"))
    arrived = kernel.dispatch(x, routing, ep)
    expected_rows = sum(int((_slots(rank, member) // _HELD == member.rank).sum()) for rank in range(ranks))
    assert len(arrived.x) == expected_rows, f"{len(arrived.x)} rows arrived, {expected_rows} were routed here"
    outputs = kernel.experts(arrived.x, arrived.routing, packed)
    result = kernel.combine(outputs, arrived, routing, ep)
    outputs_by_expert = {expert: oracle.run_expert(seen(x), each, "silu", case.dtype) for expert, each in every.items()}
    expected = oracle.combine(outputs_by_expert, weights, slots, np.zeros_like(weights), case.dtype)
    # One rounding more than where the experts of a token are summed at once: outputs travel in the dtype.
    device.compare(f"rank {member.rank}: combined", result, Bounded(expected.value, 2 * expected.bound))
    padded = seen(result)[len(slots) - _PADDED :]
    assert not padded.any(), "padded tokens came back as something"
    return b""


def _count(rank: int, member: Member) -> int:
    """Tokens of a rank, padded ones among them."""
    return _PADDED + (0 if rank == 1 else member.case.size + rank)


def _slots(rank: int, member: Member) -> Array:
    """[num_tokens, top_k]: two experts of each token, most of them of the first rank; -1 for padded tokens."""
    rng = np.random.default_rng((3, rank))
    picked = np.argsort(rng.random((_count(rank, member), _HELD * member.count)) ** 2, axis=1)[:, :_TOP_K]
    picked[len(picked) - _PADDED :] = -1
    return picked


def _tokens(member: Member) -> tuple[Tensor, Array, Array]:
    """This rank's tokens, their weights, their slots."""
    rng, count = np.random.default_rng((5, member.rank)), _count(member.rank, member)
    x = member.device.tensor(rng.normal(size=(count, member.case.width)), member.case.dtype)
    weights = rng.uniform(0.1, 1.0, size=(count, _TOP_K)).astype(np.float32).astype(float)
    return x, weights, _slots(member.rank, member)
