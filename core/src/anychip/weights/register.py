"""The register in which layers say which checkpoint tensors they want, and the loader that hands them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

from anychip.errors import CheckpointError
from anychip.plugin_api import WeightView
from anychip.text_parts import decoder_name

Take = Callable[[WeightView], None]
"""Reads a rank's share of a tensor."""


@dataclass(slots=True)
class WeightSlot:
    """One checkpoint tensor that layers want. `shape` None: those who take it check it."""

    name: str
    shape: tuple[int, ...] | None
    takers: list[Take]


@dataclass(slots=True)
class WeightRegister:
    """Filled while layers are built, emptied by the loader."""

    slots: dict[str, WeightSlot] = field(default_factory=dict)
    finishers: list[Callable[[], None]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    """Endings of tensor names that a checkpoint may hold and the model does not use."""
    elsewhere: tuple[str, ...] = ()
    """Beginnings of names that others want: other ranks, or who applies a head to vectors; or that nobody does."""
    notes: tuple[str, ...] = ()
    """What of the checkpoint is left out, for whoever starts it to read."""
    optional: set[str] = field(default_factory=set)
    """Wanted names that a checkpoint may lack."""
    rename: Callable[[str], str] = str
    """From a checkpoint's names to those that are wanted."""
    decoder: str = "model."
    """What names of the decoder begin with; a checkpoint saved from the decoder alone leaves it out."""

    aliases: dict[str, str] = field(default_factory=dict)
    """Wanted names that a tensor of another name serves, by that name."""

    def place(self, name: str) -> str:
        """The name under which a checkpoint's tensor is wanted, if it is."""
        name = self.rename(decoder_name(name))
        name = self.aliases.get(name, name)
        return name if name in self.slots or self.decoder + name not in self.slots else self.decoder + name

    def finish(self) -> None:
        """Once every tensor is with its layers."""
        for finish in self.finishers:
            finish()

    def want(self, name: str, shape: tuple[int, ...] | None, take: Take) -> None:
        """A tensor that several parts are cut from is wanted once by each of them."""
        slot = self.slots.setdefault(name, WeightSlot(name, shape, []))
        assert slot.shape == shape, f"{name} is wanted as {slot.shape} and as {shape}"
        slot.takers.append(take)


def load_weights(register: WeightRegister, views: Iterator[tuple[str, WeightView]], origin: str) -> None:
    """Gives each wanted tensor to its layers. Raises CheckpointError for a tensor that is missing, unknown or
    mis-shaped, naming it and its file."""
    missing = dict(register.slots)
    for name, view in views:
        name = register.place(name)
        slot = missing.pop(name, None)
        if slot is None:
            if name in register.slots:
                raise CheckpointError(f"{view.source} is another {name!r}: the checkpoint holds it under two names")
            if name.endswith(register.ignored) or name.startswith(register.elsewhere):
                continue
            raise CheckpointError(f"{view.source} has no place in the model; is config.json from another checkpoint?")
        if slot.shape is not None and view.shape != slot.shape:
            raise CheckpointError(f"{view.source} has shape {list(view.shape)}, the model wants {list(slot.shape)}")
        for take in slot.takers:
            take(view)
    names = sorted(missing.keys() - register.optional)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        shape = missing[names[0]].shape
        extent = f" of shape {list(shape)} ({prod(shape)} values)" if shape is not None else ""
        raise CheckpointError(f"{origin} lacks tensor {names[0]!r}{extent}{more}")
