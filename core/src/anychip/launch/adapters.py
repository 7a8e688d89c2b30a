"""What adapters are called: names are aliases of contents. Does not load any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anychip.adapter_files import AdapterFolder
from anychip.errors import AdapterRefused, UnknownModel

_SHOWN = 200


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """`digest` is over the configuration and the weights that were in `folder` when it was loaded."""

    name: str
    folder: str
    digest: bytes


def read_named(name: str, folder: str) -> NamedAdapter:
    """Reads the folder's bytes for their digest. Raises AdapterRefused."""
    path = Path(folder).resolve()
    return NamedAdapter(name, str(path), AdapterFolder(path).digest())


class AdapterNames:
    """`base` is what clients call the model itself."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._named: dict[str, NamedAdapter] = {}

    def __iter__(self) -> Iterator[NamedAdapter]:
        return iter(list(self._named.values()))

    def get(self, name: str) -> NamedAdapter | None:
        return self._named.get(name)

    def find(self, name: str) -> NamedAdapter:
        """Raises UnknownModel, with the names that there are."""
        found = self._named.get(name)
        if found is None:
            known = ", ".join(self._named) or "there are none"
            raise UnknownModel(f"adapter {name[:_SHOWN]!r} is not loaded; loaded are: {known}")
        return found

    def check_new(self, adapter: NamedAdapter, *, replace: bool) -> None:
        """Raises AdapterRefused for a name that cannot be, or that has another content already."""
        if not adapter.name or adapter.name != adapter.name.strip():
            raise AdapterRefused(f"adapter name {adapter.name[:_SHOWN]!r} is empty or has white space at an end")
        if adapter.name == self._base:
            raise AdapterRefused(f"{adapter.name[:_SHOWN]!r} is the model's own name; call the adapter otherwise")
        known = self._named.get(adapter.name)
        if known is not None and known.digest != adapter.digest and not replace:
            raise AdapterRefused(
                f"adapter {adapter.name[:_SHOWN]!r} is loaded with other contents; unload it first, or load it with "
                "load_inplace: true"
            )

    def add(self, adapter: NamedAdapter) -> bytes | None:
        """Returns the digest that no name stands for any more, where there is one."""
        before = self._named.get(adapter.name)
        self._named[adapter.name] = adapter
        return None if before is None else self._unnamed(before.digest)

    def remove(self, name: str) -> bytes | None:
        """The same of a name that is no more. Raises UnknownModel."""
        digest = self.find(name).digest
        del self._named[name]
        return self._unnamed(digest)

    def _unnamed(self, digest: bytes) -> bytes | None:
        return digest if all(each.digest != digest for each in self._named.values()) else None
