"""Finds plugins, asks their probes, and chooses a device with reasons. Opens nothing and writes nothing."""
