"""The commands that this package adds to the `anychip` program. Announces them, and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from anychip.plugin_api import CommandManifest, hookimpl


@hookimpl
def anychip_commands() -> Sequence[CommandManifest]:
    return [
        CommandManifest(
            name="conformance",
            summary="judge a device's plugin, and write its scorecard",
            module="anychip_conformance.commands.conformance",
        ),
        CommandManifest(
            name="new-plugin",
            summary="write a complete plugin package that passes the suite's Core profile",
            module="anychip_conformance.commands.new_plugin",
        ),
        CommandManifest(
            name="diff-numerics",
            summary="run a model on two devices and find the first layer that differs",
            module="anychip_conformance.commands.diff_numerics",
        ),
    ]
