"""The CPU captures no graphs: a launch costs a function call. plugin_api's defaults serve."""

from anychip.plugin_api import GraphCapture, ShapePolicy

__all__ = ["GraphCapture", "ShapePolicy"]
