"""A server's adapters: loaded, replaced and unloaded while requests run, and loaded again into a new engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from anychip.engine.async_engine import AsyncEngine
from anychip.errors import AdapterRefused
from anychip.launch.adapters import AdapterNames, NamedAdapter, read_named
from anychip.messages import LoadAdapter
from anychip.observability.metrics import Metrics

log = logging.getLogger("anychip.engine")


class ServedAdapters:
    """One change at a time. `base` is what clients call the model itself, `engine` gives the engine that lives."""

    def __init__(self, base: str, engine: Callable[[], AsyncEngine], metrics: Metrics) -> None:
        self.names = AdapterNames(base)
        self._metrics = metrics
        self._engine = engine
        self._changing = asyncio.Lock()

    async def load(self, name: str, folder: str, *, replace: bool = False) -> NamedAdapter:
        """Requests may ask for the adapter by its name once this returns. With `replace`, a name that is taken gets the
        new content: requests that run keep the old one. Raises AdapterRefused, with everything as it was."""
        async with self._changing:
            adapter = await asyncio.to_thread(read_named, name, folder)
            self.names.check_new(adapter, replace=replace)
            await self._engine().load_adapter(LoadAdapter(adapter.digest, adapter.folder))
            before = self.names.get(name)
            if before is not None:
                self._metrics.adapter_gone(name, before.digest)
            self._drop(self.names.add(adapter))
            self._metrics.adapter_loaded(name, adapter.digest)
            return adapter

    async def unload(self, name: str) -> NamedAdapter:
        """No request begins with the adapter any more; those that have it end first. Raises UnknownModel."""
        async with self._changing:
            adapter = self.names.find(name)
            self._drop(self.names.remove(name))
            self._metrics.adapter_gone(name, adapter.digest)
            return adapter

    async def load_again(self, engine: AsyncEngine) -> None:
        """A new engine gets all of them. One whose files have changed or gone is no more."""
        async with self._changing:
            for adapter in self.names:
                try:
                    await engine.load_adapter(LoadAdapter(adapter.digest, adapter.folder))
                except AdapterRefused as error:
                    log.error("adapter %s is not loaded again: %s", adapter.name, error)
                    self.names.remove(adapter.name)
                    self._metrics.adapter_gone(adapter.name, adapter.digest)

    def _drop(self, digest: bytes | None) -> None:
        if digest is not None:
            self._engine().drop_adapter(digest)
