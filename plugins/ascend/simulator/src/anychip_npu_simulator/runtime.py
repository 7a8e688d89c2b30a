"""Imported where a plugin's manifest names the vendor's runtime: the simulator, and torch_npu over it."""

from anychip_npu_simulator.install import install

install()
