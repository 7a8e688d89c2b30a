"""The adapters that a worker has on the host: read by a thread beside the steps, and found when a slot gets one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from anychip.errors import AdapterRefused, AnychipError
from anychip.messages import AdapterReport, LoadAdapter
from anychip.plugin_api import AdapterEntry, AdapterSite, StepLimits
from anychip.step_messages import AdapterSlot
from anychip.weights.adapter import BaseWeights, LoadedAdapter, check_fits, load_adapter
from anychip.weights.adapter_base import check_base, with_gains
from anychip.weights.adapter_experts import by_expert, stacks_of_sites

Report = Callable[[AdapterReport], None]
"""Hears of an adapter once it is loaded, or refused; in any thread."""


class AdapterStore:
    """`sites` are the products that take adapters; `max_rank` is what their slots have room for, 0: there are none.
    Matrices of modules whose names begin as one of `elsewhere` does are other ranks'. `base` is the model's
    checkpoint."""

    def __init__(
        self, sites: Sequence[AdapterSite], max_rank: int, base: BaseWeights, elsewhere: tuple[str, ...] = ()
    ) -> None:
        self._elsewhere = elsewhere
        self._base = base
        self._sites = sites
        self._max_rank = max_rank
        self._held: dict[bytes, LoadedAdapter] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def __len__(self) -> int:
        return len(self._held)

    def load(self, message: LoadAdapter, report: Report) -> None:
        """Reads it beside whatever the caller does next."""
        self._thread.submit(self._load, message, report)

    def drop(self, digest: bytes) -> None:
        """Forgets it, behind the loads that were asked for before. What slots hold of it stays there."""
        self._thread.submit(self._held.pop, digest, None)

    def entries(self, slots: Sequence[AdapterSlot]) -> list[AdapterEntry]:
        """What the slots are to hold. The engine has seen to it that all are here."""
        return [AdapterEntry(each.slot, self._held[each.digest].modules) for each in slots]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _load(self, message: LoadAdapter, report: Report) -> None:
        error: tuple[str, str] | None = None
        try:
            if message.digest not in self._held:
                self._held[message.digest] = self._checked(message)
        except AnychipError as refused:
            error = (type(refused).__name__, str(refused))
        except Exception as failed:  # noqa: BLE001 - a thread's boundary: who waits for the adapter learns of it
            error = (AdapterRefused.__name__, f"{message.folder}: {type(failed).__name__}: {failed}")
        report(AdapterReport(message.digest, error))

    def _checked(self, message: LoadAdapter) -> LoadedAdapter:
        if not self._max_rank:
            raise AdapterRefused("the engine has no slots for adapters; start it with --max-adapters")
        loaded = by_expert(load_adapter(Path(message.folder), message.digest), stacks_of_sites(self._sites))
        own = {name: pair for name, pair in loaded.modules.items() if not name.startswith(self._elsewhere)}
        magnitudes = {name: held for name, held in loaded.magnitudes.items() if not name.startswith(self._elsewhere)}
        loaded = replace(loaded, modules=own, magnitudes=magnitudes)
        check_fits(loaded, self._sites, self._max_rank)
        check_base(loaded, self._base)
        return replace(with_gains(loaded, self._base), base={}, magnitudes={})  # gains say what they say


def slot_bytes(sites: Sequence[AdapterSite], limits: StepLimits) -> int:
    """What the slots of adapters take on one rank."""
    return sum(site.nbytes(limits.max_adapters, limits.max_adapter_rank) for site in sites)
