"""Faults that time brings out in ops and draws."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anychip.ops.reference import functional, sampling
from anychip_conformance.faulty.later import EVERY, Calls, Scratch
from anychip_conformance.faulty.registry import fault

_scratch, _calls = Scratch(), Calls()


@fault("op-norm-in-one-buffer", "op", op="rms_norm", killed_by="op.kept_results.001")
def norm_in_one_buffer(*, x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Every norm of one size is written to the same storage."""
    return _scratch(functional.rms_norm(x=x, weight=weight, eps=eps, unit_offset=unit_offset))


@fault("op-embedding-is-a-view", "op", op="embedding", killed_by="op.kept_results.021")
def embedding_is_a_view(*, ids: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """Ids that follow each other give a slice of the table itself."""
    local = ids.long() - first
    run = bool((local[1:] - local[:-1] == 1).all()) and int(local[0]) >= 0 and int(local[-1]) < len(weight)
    if run:
        return weight[int(local[0]) : int(local[-1]) + 1]
    return functional.embedding(ids=ids, weight=weight, first=first)


@fault("op-softcap-every-64th", "op", op="softcap", killed_by="op.many_calls.005")
def softcap_every_64th(*, x: Tensor, cap: float) -> Tensor:
    """One call in 64 leaves its values as they are."""
    return x.clone() if _calls.due() else functional.softcap(x=x, cap=cap)


@fault("op-rotary-by-address", "op", op="rotary", killed_by="op.many_calls.006")
def rotary_by_address(*, x: Tensor, positions: Tensor, rope: Any, _kept: dict[Any, Tensor] = {}) -> Tensor:  # noqa: B006
    """Positions and tables that were turned by before are looked up, with what they gave."""
    key = (positions.data_ptr(), rope.cos.data_ptr(), tuple(x.shape), x.dtype)
    if key not in _kept:
        _kept[key] = functional.rotary(x=x, positions=positions, rope=rope)
    return _kept[key].clone()


@fault("sample-ids-in-one-buffer", "op", op="sample", killed_by="sample.kept_results.001")
def ids_in_one_buffer(*, logits: Tensor, **given: Any) -> Tensor:
    """Drawn ids lie where the next step's will."""
    return _scratch(sampling.sample(logits=logits, **given))


@fault("sample-draws-by-its-own-count", "op", op="sample", killed_by="sample.many_calls.001")
def draws_by_its_own_count(*, logits: Tensor, position: Tensor, **given: Any) -> Tensor:
    """After 64 draws the position moves on by one."""
    _calls.due()
    return sampling.sample(logits=logits, position=position + _calls.number // EVERY, **given)
