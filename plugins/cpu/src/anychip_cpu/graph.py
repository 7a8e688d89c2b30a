"""The CPU captures no graphs, since a launch costs a function call: the interface's default serves."""

from anychip.plugin_api import GraphCapture

__all__ = ["GraphCapture"]
