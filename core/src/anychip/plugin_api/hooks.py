"""The pluggy hooks of entry-point group "anychip". Implementing one needs no torch.

from anychip.plugin_api import hookimpl, PlatformManifest

@hookimpl
def anychip_platforms():
    return [PlatformManifest(name="acme", ...)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from anychip.plugin_api.manifest import (
        CommandManifest,
        ModelManifest,
        ParserManifest,
        PlatformManifest,
        PolicyManifest,
        ProposerManifest,
        QuantFormatManifest,
    )

GROUP = "anychip"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class HookSpecs:
    """What a package may contribute. Every hook returns a sequence, empty where it has nothing."""

    @hookspec
    def anychip_platforms(self) -> Sequence[PlatformManifest]:
        """Devices that the package drives."""
        return ()

    @hookspec
    def anychip_models(self) -> Sequence[ModelManifest]:
        """Model families beyond core's own; a platform of the step seam may bring its own code for one."""
        return ()

    @hookspec
    def anychip_policies(self) -> Sequence[PolicyManifest]:
        """Scheduling policies beyond fcfs and priority."""
        return ()

    @hookspec
    def anychip_proposers(self) -> Sequence[ProposerManifest]:
        """What drafts tokens beyond core's ngram and suffix."""
        return ()

    @hookspec
    def anychip_parsers(self) -> Sequence[ParserManifest]:
        """Parsers of tool calls and reasoning beyond core's own."""
        return ()

    @hookspec
    def anychip_quant_formats(self) -> Sequence[QuantFormatManifest]:
        """Containers of quantized checkpoints beyond core's own. A method that core or another package reads is
        refused."""
        return ()

    @hookspec
    def anychip_commands(self) -> Sequence[CommandManifest]:
        """Commands of the `anychip` program beyond core's own."""
        return ()
