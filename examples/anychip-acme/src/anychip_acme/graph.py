"""Graphs: subclass plugin_api.GraphCapture, declare graph_level, and have graph_capture() return it."""
