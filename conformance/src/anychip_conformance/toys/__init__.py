"""Made-up models whose layers keep what no family's layers keep yet: they prove that the engine carries every kind.

This module announces them and imports nothing heavy.
"""

from __future__ import annotations

from anychip.plugin_api import ModelManifest

ARCHITECTURE = "ToyOfKindsForCausalLM"
"""Its config.json lists a kind for each layer in `layer_kinds`: state, latent, full or window."""

MODEL = ModelManifest(architectures=[ARCHITECTURE], model="anychip_conformance.toys.model:ToyOfKinds")

TOYS = {
    "toy-state": ("state", "full", "state", "window"),
    "toy-only-states": ("state", "state"),
    "toy-latent": ("latent", "latent"),
    "toy-every-kind": ("state", "latent", "full", "window", "state"),
}
"""By name: the kinds of its layers."""
