"""Collectives: subclass plugin_api.Communicator, declare collectives="runtime", and have communicator() return it."""
