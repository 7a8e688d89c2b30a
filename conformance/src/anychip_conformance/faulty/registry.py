"""The faults, by id. A fault is a class that replaces one part of an honest platform, and says what kills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypeVar

Part = Literal[
    "attention", "latent", "sparse", "state", "recurrence", "encoder", "linear", "moe", "op", "op of a rank",
    "communicator", "shapes", "graphs", "hostlen attention", "step", "mesh",
]  # fmt: skip
P = TypeVar("P")

_MODULES = (
    "attention",
    "log_sums",
    "addressing",
    "storage",
    "latents",
    "latent_forms",
    "latent_ranks",
    "sparse",
    "states",
    "recurrences",
    "encoders",
    "ops",
    "products",
    "formats",
    "experts",
    "expert_ranks",
    "sampling",
    "ranks",
    "axes",
    "meshes",
    "steps",
    "step_drafts",
    "step_drafts_results",
    "step_extras",
    "adapters",
    "reach_attention",
    "reach_ops",
    "reach_products",
    "reach_steps",
    "forms",
    "bad_rows",
    "bad_rows_caches",
    "later",
    "later_ops",
    "moves",
    "eight_bits",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """`replacement` stands in for the honest `part`. For an op it is the override of op `op`; of a rank, it makes that
    from the rank's platform."""

    id: str
    part: Part
    killed_by: str
    replacement: Any
    op: str = ""

    @property
    def device(self) -> str:
        """Which of the faulty platforms takes it."""
        return {
            "graphs": "fake-faulty-graphs",
            "hostlen attention": "fake-faulty-graphs",
            "step": "fake-faulty-step",
            "mesh": "fake-faulty-mesh",
        }.get(self.part, "fake-faulty")

    @property
    def summary(self) -> str:
        """What is wrong, in a sentence."""
        return " ".join((self.replacement.__doc__ or "").split())


FAULTS: dict[str, Fault] = {}


def fault(id: str, part: Part, *, killed_by: str, op: str = "") -> Callable[[P], P]:
    """Registers what it decorates."""

    def register(replacement: P) -> P:
        assert id not in FAULTS and replacement.__doc__, id
        FAULTS[id] = Fault(id, part, killed_by, replacement, op)
        return replacement

    return register


def placebo(id: str, part: Part) -> Callable[[P], P]:
    """Registers a harmless change, which nothing may kill."""
    return fault(id, part, killed_by="")


@cache
def _registered() -> dict[str, Fault]:
    for module in _MODULES:
        import_module(f"anychip_conformance.faulty.{module}")
    return FAULTS


def find(id: str) -> Fault | None:
    """A fault or a placebo."""
    return _registered().get(id)


def all_faults() -> dict[str, Fault]:
    return {id: found for id, found in _registered().items() if found.killed_by}


def placebos() -> dict[str, Fault]:
    return {id: found for id, found in _registered().items() if not found.killed_by}
